"""The edits of a loaded model, as a worker keeps them: in the graph, in the weights, and versions made ready."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.graph.edited_model import EditedModel, Prepared
from vllm_edits.plugin.graph.host_cache import HostCache
from vllm_edits.plugin.vllm_host.ending import EndsRequests
from vllm_edits.plugin.weights.patched_weights import Patch, PatchedWeights


@dataclass
class LoadedEdits:
    """The edits of a loaded model, for the worker. It is not a module, so it is not part of the model's tree."""

    edited: EditedModel
    base: BaseModelRef
    ready: HostCache[Prepared]
    weights: PatchedWeights
    patches: HostCache[Patch]
    ending: EndsRequests
    runner: str = "V1"
    """The model runner that fills the token slots. The V2 runner's state sets it when it is built."""


def edits_of(model: Any) -> LoadedEdits:
    """The edits of a model that this loader loaded."""
    loaded = getattr(model, "loaded_edits", None)
    if not isinstance(loaded, LoadedEdits):
        raise UnsupportedHost("this model was not loaded with --load-format edits")
    return loaded
