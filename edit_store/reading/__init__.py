"""How a server reads a store: what moved, whom to believe, and its own copies."""
