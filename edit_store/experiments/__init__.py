"""The document of an experiment, how it stands, and its log."""
