"""Experiments: the arm of a request, its exposure in the log, guardrails, and the analysis of the logs."""
