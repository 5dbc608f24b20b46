"""What is computed: configuration, parameters, layers, cache, the decoder and the heads."""
