"""Times of a round's parts at any size."""
