"""What runs inside the compiled graph, and the room for it. Runs in every worker."""
