"""Conversion, quantisation and inspection of checkpoints."""

from specmq_jax.commands import interrupts  # noqa: F401 (first, for Ctrl-C while a command is being imported)
