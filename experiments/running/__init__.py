"""Flags to settings, settings to models, models to answers."""
