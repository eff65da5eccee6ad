"""The `vllm-edits` command. It runs in its own process, works on stores, asks servers, and starts vLLM."""

from vllm_edits.plugin.cli.commands import main

__all__ = ["main"]
