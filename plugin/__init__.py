"""The server side of vllm-edits. Importing it is cheap: only `vllm_edits.plugin.vllm_host` imports vLLM."""
