"""Which problems the kernels are timed and tuned on, and the search."""
