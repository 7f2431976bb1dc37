"""Tasks: what users' labelled data look like, a trained network on them, and the scores.

Stands beside ``train`` and ``export``; the command is ``python -m skysense_jax.eval``.
"""
