"""Benchmarks: prompts in, JSONL answers, tables and plots out."""

from specmq_jax.commands import interrupts  # noqa: F401 (first, for Ctrl-C while a command is being imported)
