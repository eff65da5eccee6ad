"""Real servers and clients, for the benchmark, the demo and the tests."""
