"""What a version does to its model: measured by suites, on a transformers model or a running server."""
