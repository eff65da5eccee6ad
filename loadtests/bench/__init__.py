"""The benchmark: engines side by side, in rounds."""
