"""What is measured in seconds, without an engine."""
