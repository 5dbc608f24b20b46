"""How tensors are laid into files."""
