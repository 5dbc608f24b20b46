"""Questions, and the files they are published in."""
