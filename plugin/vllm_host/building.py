"""Makes the edited model of a worker for a reservation: at its start, and again when the reservation grows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_reduce

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.sites import Site
from vllm_edits.plugin.graph.cpu_products import products_for
from vllm_edits.plugin.graph.edited_model import EditedModel, SiteModule
from vllm_edits.plugin.graph.reservation import Reservation
from vllm_edits.plugin.graph.slot_bytes import slot_bytes
from vllm_edits.plugin.graph.slot_products import EXPRESSIONS, SlotProducts
from vllm_edits.plugin.graph.tensor_parallel import Rank
from vllm_edits.plugin.plan import Plan
from vllm_edits.plugin.vllm_host.ending import EndsRequests
from vllm_edits.plugin.weights import weights_reservation
from vllm_edits.plugin.weights.weights_reservation import WeightsReservation
from vllm_edits.server_config.settings import KEY, CompiledSettings, EditSettings

_PACKAGE = Path(__file__).parents[2]
_COMPILED_FROM = ("plugin/graph", "plugin/weights", "plugin/vllm_host", "edit_store")
"""edit_store says which module an edit at a site is around"""


@cache
def _sources() -> str:
    """Digest of the code that decides what is compiled for a reservation."""
    digest = hashlib.sha256()
    for folder in _COMPILED_FROM:
        for path in sorted((_PACKAGE / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Building:
    """The parts that all edited models of one loaded model have in common, whatever is reserved."""

    def __init__(
        self, config: Any, settings: EditSettings, base: BaseModelRef, *, sites: Mapping[Site, SiteModule],
        device: torch.device, rank: Rank, in_weights: WeightsReservation, ending: EndsRequests,
    ) -> None:  # fmt: skip
        """config: vLLM's config, whose additional config is what the operator gave."""
        self.device = device
        self._settings = settings
        self._given: dict[str, Any] = dict(config.additional_config)
        self._architecture = repr(supported(base.architecture))
        self._dtype = config.model_config.dtype
        self._max_tokens = config.scheduler_config.max_num_batched_tokens
        self._sites = sites
        self._rank = rank
        self._in_weights = in_weights
        self._end_request: Callable[..., bool] = ending.end
        self._slot_bytes = slot_bytes(base.widths, self._dtype, rank.size)

    def make(self, reservation: Reservation) -> EditedModel:
        """An edited model with this reservation, not attached to the modules."""
        return EditedModel(
            self._sites, reservation, slots=self._settings.slots, max_tokens=self._max_tokens, dtype=self._dtype,
            device=self.device, worker=self._rank, over_workers=tensor_model_parallel_all_reduce,
            products=self._products(reservation), end_request=self._end_request,
        )  # fmt: skip

    def plan(self, reservation: Reservation) -> Plan:
        """The device memory of a reservation."""
        return Plan.of(reservation, self._slot_bytes)

    def additional(self, reservation: Reservation) -> dict[str, Any]:
        """vLLM's additional config with all that the compiled code depends on, and no more: its cache's key has it.

        vLLM looks itself whether a source file that was compiled has changed, but not whether another one has. The
        architecture may have been registered from outside.
        """
        own = CompiledSettings(
            self._given[KEY], reserve=reservation.to_settings(), scopes=reservation.scopes,
            weights_reserve=weights_reservation.to_settings(self._in_weights),
        )  # fmt: skip
        return {
            **self._given, KEY: own, "edits_products": self._products(reservation).name,
            "edits_architecture": self._architecture, "edits_sources": _sources(),
        }  # fmt: skip

    def _products(self, reservation: Reservation) -> SlotProducts:
        return products_for(self.device, self._dtype) if reservation.several_ranks else EXPRESSIONS
