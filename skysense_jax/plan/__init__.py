"""Will a run fit and how long will it take, before an accelerator is rented: ``python -m skysense_jax.plan``.

The true training step is compiled ahead of time for the target by the target's own compiler, on any machine: no
accelerator is needed. flops.py: what the step multiplies; hlo.py: the compiled program's text, taken apart; program.py:
what it moves and sends, in its order; forecast.py: compile, measure, predict; sweep.py: several; __main__.py: the
command. Which chips: targets.py and chips.py beside this folder.
"""
