"""The Hugging Face Hub as a channel for versions: push and pull."""
