"""The only folder that imports vLLM. It contains every use of vLLM's interfaces, and the check that they exist."""
