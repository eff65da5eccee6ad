"""Edits inside the compiled graph, and the capacity reserved for them. Runs in every worker."""
