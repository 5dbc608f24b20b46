"""The files that hold tensors, whatever these mean."""
