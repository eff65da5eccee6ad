"""The load format `edits`: loads the base model with vLLM's own loader, then makes its sites editable. Runs in workers.

vLLM does not start with an unknown load format. So without this plugin, the base model is never served by mistake.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from torch import nn
from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.graph.host_cache import HostCache
from vllm_edits.plugin.graph.tensor_parallel import Rank
from vllm_edits.plugin.plan import reservations
from vllm_edits.plugin.vllm_host import base_files, compat, front_ends
from vllm_edits.plugin.vllm_host.architectures import site_modules
from vllm_edits.plugin.vllm_host.building import Building
from vllm_edits.plugin.vllm_host.compiled import FirstCall, load_before_first_call
from vllm_edits.plugin.vllm_host.device import check_compiler, check_device, free_for_slots
from vllm_edits.plugin.vllm_host.ending import EndsRequests
from vllm_edits.plugin.vllm_host.loaded import LoadedEdits, reading
from vllm_edits.plugin.vllm_host.nan_guard import guard_against_nan
from vllm_edits.plugin.vllm_host.proof import require_effective
from vllm_edits.plugin.vllm_host.runner_v2 import use_edits_model_state
from vllm_edits.plugin.vllm_host.weights import keeping_loaded, patchable
from vllm_edits.plugin.vllm_host.worker import EditsWorker
from vllm_edits.plugin.weights.checkpoint import Checkpoint
from vllm_edits.server_config.settings import EditSettings, read_settings

logger = logging.getLogger("vllm.edits")


class EditsModelLoader(BaseModelLoader):  # type: ignore[misc]
    """The model loader. It delegates the loading of weights to the loader of `edits.inner_load_format`."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self._inner: BaseModelLoader | None = None

    def _loader(self, settings: EditSettings) -> BaseModelLoader:
        if self._inner is None:
            self._inner = base_files.loader_of(self.load_config, settings.inner_load_format)
        return self._inner

    def download_model(self, model_config: ModelConfig) -> None:
        self._require_inner().download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        self._require_inner().load_weights(model, model_config)

    def _require_inner(self) -> BaseModelLoader:
        if self._inner is None:
            raise UnsupportedHost("load format `edits` was asked for weights before it loaded a model")
        return self._inner

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> Any:
        """Load the base model and reserve the slot tensors. Any failed check ends the start here."""
        settings = read_settings(vllm_config.additional_config)
        compat.check_version(any_vllm=settings.any_vllm)
        if envs.VLLM_PLUGINS is None or compat.PLUGIN_NAME not in envs.VLLM_PLUGINS:
            raise UnsupportedHost(
                f"load format `edits` needs VLLM_PLUGINS to name {compat.PLUGIN_NAME!r}, found {envs.VLLM_PLUGINS}: "
                "without it vLLM does not load the plugin's HTTP side. Start with VLLM_PLUGINS=edits (no spaces)"
            )
        if model_config.runner_type == "draft":  # the draft model is not edited; the edited model verifies its tokens
            loader = get_model_loader(dataclasses.replace(self.load_config, load_format=settings.inner_load_format))
            return loader.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        front_ends.require_http()
        compat.check_config(vllm_config)
        check_device(vllm_config.device_config.device)
        check_compiler(vllm_config.device_config.device, vllm_config.compilation_config)
        inner = self._loader(settings)
        folder = base_files.fetched(inner, model_config)
        base = base_files.base_of(model_config, folder)
        architecture = supported(base.architecture)
        reservation, in_weights = reservations(settings, base)
        compat.check_reservation(vllm_config, base, reservation)
        tensor_parallel = Rank(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())

        def patched(model: nn.Module) -> list[nn.Module]:
            sites = site_modules(model, base.architecture, base.widths, tensor_parallel)
            return [sites[site].module for site in in_weights]

        with keeping_loaded(inner, patched) as kept:
            model: Any = inner.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        sites = site_modules(model, base.architecture, base.widths, tensor_parallel)
        weights = patchable(model, sites, in_weights, kept, Checkpoint(folder, architecture, base.widths))
        device = next(model.parameters()).device
        ending = EndsRequests(vllm_config)
        building = Building(
            vllm_config, settings, base, sites=sites, device=device, rank=tensor_parallel, in_weights=in_weights,
            ending=ending,
        )  # fmt: skip
        free = free_for_slots(vllm_config, model, device)
        building.plan(reservation).require(settings.slots, free.size, free.beside)
        vllm_config.additional_config.update(building.additional(reservation))
        edited = building.make(reservation)
        edited.attach()
        guard_against_nan(model)
        require_effective(model, edited, vllm_config, device)
        EditsWorker.extend(resolve_obj_by_qualname(vllm_config.parallel_config.worker_cls))
        model.loaded_edits = LoadedEdits(
            edited, base, settings,
            HostCache(reading(edited.prepare, base, settings), settings.host_cache_bytes), weights,
            HostCache(reading(weights.prepare, base, settings), 0), ending, building, FirstCall.of(model),
        )  # fmt: skip
        use_edits_model_state(model, model.loaded_edits)
        load_before_first_call(model, vllm_config)
        return model
