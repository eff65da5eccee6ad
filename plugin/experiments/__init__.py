"""Experiments: which arm a request belongs to, what is logged of it, and what the logs say."""
