"""What a round costs: its bytes, the times of its parts, and the table of times that settings are chosen by."""
