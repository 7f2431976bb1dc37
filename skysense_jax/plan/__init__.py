"""Will a run fit and how long will it take, before an accelerator is rented: ``python -m skysense_jax.plan``.

The true training step is compiled ahead of time for the target by the target's own compiler, on any machine: no
accelerator is needed. targets.py: how many chips of a kind; flops.py: what the step multiplies; program.py: what the
compiled program moves and sends; forecast.py: compile, measure, predict; __main__.py: the command.
"""
