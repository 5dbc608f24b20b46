"""What every command shares: its entry point, its flags' values, its help, and its ends."""
