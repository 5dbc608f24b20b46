"""Rotations of a model's hidden states."""
