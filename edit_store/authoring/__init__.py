"""Edits computed from a model: one published method per file. Needs torch, and does not need vLLM."""
