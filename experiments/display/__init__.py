"""How figures, tables and pictures look."""
