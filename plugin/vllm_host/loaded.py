"""What a worker keeps beside its loaded model: edits in the graph, edits in the weights, versions made ready."""

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
    """What a worker needs to find again on its model. Not a module, so it is not part of the model's tree."""

    edited: EditedModel
    base: BaseModelRef
    ready: HostCache[Prepared]
    weights: PatchedWeights
    patches: HostCache[Patch]
    ending: EndsRequests
    runner: str = "V1"
    """Which model runner feeds the token slots; the V2 runner's state says so when it is built."""


def edits_of(model: Any) -> LoadedEdits:
    """The edits of a model that this loader loaded."""
    loaded = getattr(model, "loaded_edits", None)
    if not isinstance(loaded, LoadedEdits):
        raise UnsupportedHost("this model was not loaded with --load-format edits")
    return loaded
