"""Benchmarks: prompts in, JSONL answers, tables and plots out."""

import sys

if sys.argv[:1] == ["-m"]:  # for Ctrl-C while a command is being imported; the program specmq imports no JAX
    from specmq_jax.commands import interrupts  # noqa: F401
