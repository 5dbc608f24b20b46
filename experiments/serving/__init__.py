"""Chat and server."""
