"""The `vllm-edits` command. Runs in a process of its own: it looks at stores and servers, and starts vLLM."""

from vllm_edits.plugin.cli.commands import main

__all__ = ["main"]
