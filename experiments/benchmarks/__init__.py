"""What tells one benchmark from another."""
