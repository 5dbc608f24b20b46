"""Draft, verify, accept: rounds, drafters, and what they cost."""
