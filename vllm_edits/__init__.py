"""Edited variants of one base model, served by one vLLM.

`plugin` is the server's side, `edit_store` the bundles and their store, `server_config` the settings. Their folders are
at the top level of the repository; here are links to them, so that an installed wheel owns one name and no other's.

What configurations and programs name is here, wherever it is defined: `vllm_edits.EditsScheduler` for --scheduler-cls,
`vllm_edits.Variants` for `vllm.LLM`. Both import vLLM when they are asked for, and importing this package does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_edits.plugin.vllm_host.offline import Variants
    from vllm_edits.plugin.vllm_host.scheduler import EditsScheduler

__all__ = ["EditsScheduler", "Variants"]

_DEFINED_IN = {
    "EditsScheduler": "vllm_edits.plugin.vllm_host.scheduler",
    "Variants": "vllm_edits.plugin.vllm_host.offline",
}


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_DEFINED_IN[name]), name)
