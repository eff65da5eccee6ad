"""The only folder that imports vLLM: every seam the plugin leans on, and the check that it is there."""
