"""Numbers, and correctness under load, against a real server."""
