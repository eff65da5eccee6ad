"""The edits of a loaded model, as a worker keeps them: in the graph, in the weights, and versions made ready."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.bundle import Manifest
from vllm_edits.edit_store.edits import Tensors
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.graph.edited_model import EditedModel, Prepared
from vllm_edits.plugin.graph.host_cache import HostCache, Ready
from vllm_edits.plugin.open_store import open_reader
from vllm_edits.plugin.vllm_host.building import Building
from vllm_edits.plugin.vllm_host.compiled import FirstCall
from vllm_edits.plugin.vllm_host.ending import EndsRequests
from vllm_edits.plugin.weights.patched_weights import Patch, PatchedWeights
from vllm_edits.server_config.settings import EditSettings

R = TypeVar("R", bound=Ready)


@dataclass
class LoadedEdits:
    """The edits of a loaded model, for the worker. It is not a module, so it is not part of the model's tree."""

    edited: EditedModel
    """the edits that serve; a growth of the reservation replaces them"""
    base: BaseModelRef
    settings: EditSettings
    ready: HostCache[Prepared]
    weights: PatchedWeights
    patches: HostCache[Patch]
    ending: EndsRequests
    building: Building
    first_call: FirstCall
    runner: str = "V1"
    """The model runner that fills the token slots. The V2 runner's state sets it when it is built."""
    growth: Any = None
    """the growth of the reservation that is under way (growth.py)"""


def reading(
    prepare: Callable[[str, Manifest, Tensors], R], base: BaseModelRef, settings: EditSettings
) -> Callable[[str], R]:
    """A function that reads a version from the store, checks it, and prepares it."""

    def read(version: str) -> R:
        bundle = open_reader(settings).bundle(version)
        return prepare(version, bundle.manifest, verify.check(bundle, base))

    return read


def edits_of(model: Any) -> LoadedEdits:
    """The edits of a model that this loader loaded."""
    loaded = getattr(model, "loaded_edits", None)
    if not isinstance(loaded, LoadedEdits):
        raise UnsupportedHost("this model was not loaded with --load-format edits")
    return loaded
