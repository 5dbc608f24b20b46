"""Benchmarks: prompts in, JSONL answers, tables and plots out."""
