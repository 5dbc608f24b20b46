"""Checkpoints whose linear weights are quantised, by toolkit."""
