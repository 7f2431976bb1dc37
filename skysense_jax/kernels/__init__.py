"""Kernels that keep in on-chip memory what XLA would write out: each with a plain counterpart in ``models``.

A kernel takes arrays and sizes and knows no module, config or mesh of its own. Read first: window.py.
"""
