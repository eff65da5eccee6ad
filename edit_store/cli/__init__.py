"""The store's commands. `vllm_edits.plugin.cli` adds the commands for servers."""

from vllm_edits.edit_store.cli import build, bundles, evaluate, experiment, hub, probes, tags, trust, upkeep  # noqa: F401  importing a module registers its commands
from vllm_edits.edit_store.cli.common import JsonOption, StoreOption, app, as_script, counted, explained, plain, show

__all__ = ["JsonOption", "StoreOption", "app", "as_script", "counted", "explained", "plain", "show"]
