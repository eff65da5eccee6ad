"""Evaluation of versions by suites of measures, on a transformers model or a running server."""
