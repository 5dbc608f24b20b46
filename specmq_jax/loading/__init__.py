"""From a directory to a model or a head on the device."""
