"""One measurement of the benchmark a file."""
