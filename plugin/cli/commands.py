"""The `vllm-edits` command: the store's commands, and those for servers."""

from __future__ import annotations

# Importing a module of commands registers them.
from vllm_edits.edit_store.cli import app
from vllm_edits.plugin.cli import (
    plan_command,  # noqa: F401
    probe_command,  # noqa: F401
    reserve_commands,  # noqa: F401
    start_commands,  # noqa: F401
    status_command,  # noqa: F401
)
from vllm_edits.plugin.experiments.analysis import cli as _experiments  # noqa: F401


def main() -> None:
    """Entry point of the command."""
    app()
