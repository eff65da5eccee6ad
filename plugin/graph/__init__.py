"""What runs inside the compiled graph, and the capacity reserved for it. Runs in every worker."""
