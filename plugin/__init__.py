"""The server side of vllm-edits. Importing it is cheap; vLLM is imported in `plugin.vllm_host` alone."""
