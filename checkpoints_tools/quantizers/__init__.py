"""Quantisers that look at what a model makes of a calibration text: GPTQ and SmoothQuant, layer by layer."""
