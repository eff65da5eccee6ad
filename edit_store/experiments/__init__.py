"""Experiments in a store: their documents, their state, and their log."""
