"""A grid of settings, cell by cell."""
