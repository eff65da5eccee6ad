"""The server side of vllm-edits. Importing it is cheap; vLLM is imported in `vllm_edits.plugin.vllm_host` alone."""
