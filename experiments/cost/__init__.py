"""The cost model: what a setting costs and what it brings."""
