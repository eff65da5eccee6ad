"""The Hugging Face Hub as a channel for bundles."""
