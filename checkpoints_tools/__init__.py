"""Conversion, quantisation and inspection of checkpoints."""
