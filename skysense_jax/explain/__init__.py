"""What a run's network sees, measured and shown on one page: python -m skysense_jax.eval.report RUN."""
