"""One variant in the model's own weights. Runs in every worker."""
