"""Checks vLLM's version and configuration before the server starts, and refuses unsupported ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vllm
from packaging.version import Version

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.claim import SCHEDULER
from vllm_edits.plugin.graph.reservation import Reservation
from vllm_edits.plugin.vllm_host import sources
from vllm_edits.plugin.vllm_host.seams import optional

logger = logging.getLogger("vllm.edits")

LOAD_FORMAT = "edits"
PLUGIN_NAME = "edits"

SUPPORTED_VLLM = (Version("0.26"), Version("0.34"))
"""From the first version with every needed interface up to, not including, the first version that was not checked."""
QUANTISED = ("compressed-tensors",)
"""Quantisation methods of the base model for which edits, which stay in full precision, are proven exact."""

_OLD_SCHEDULER = "plugin.vllm_host.scheduler.EditsScheduler"

SPECULATIVE_METHODS = ("ngram", "draft_model")
"""Methods of speculative decoding whose answers are proven to be the edited model's."""


def check_version(*, any_vllm: bool = False) -> None:
    """UnsupportedHost outside the supported range. With `any_vllm`, only a warning with the missing interfaces."""
    low, high = SUPPORTED_VLLM
    found = Version(vllm.__version__)
    if _is_supported(found):
        return
    outside = f"vllm-edits supports vLLM {low} up to (not including) {high}, found {found}"
    if not any_vllm:
        raise UnsupportedHost(f"{outside}. Install a supported version, or try this one with edits.any_vllm = true")
    lacking = "; ".join(sources.missing(_installed, found)) or "nothing known"
    logger.warning("%s. Starting anyway, because edits.any_vllm is true. What may break: %s", outside, lacking)


def check_seams(*, any_vllm: bool = False) -> None:
    """UnsupportedHost for a vLLM that has not what its version has, a changed one; with `any_vllm` only a warning.

    Asked once, where requests arrive, and takes some tenths of a second. Outside the range `check_version` has told.
    """
    found = Version(vllm.__version__)
    if not _is_supported(found) or not (lacking := "; ".join(sources.missing(_installed, found))):
        return
    if not any_vllm:
        raise UnsupportedHost(
            f"vllm-edits leans on what this vLLM {found} does not have: {lacking}. Install this version as it was "
            "released, or try this one with edits.any_vllm = true"
        )
    logger.warning("edits.any_vllm asks to start on a vLLM %s that is not whole. What would break: %s", found, lacking)


def _is_supported(found: Version) -> bool:
    low, high = SUPPORTED_VLLM
    return low <= Version(found.base_version) < high


def _installed(file: str) -> str | None:
    path = Path(vllm.__file__).parent / file
    return path.read_text(encoding="utf-8") if path.is_file() else None


def check_config(config: Any) -> None:
    """UnsupportedHost, with all reasons, for a configuration not proven exact (tests/proofs/CONFIGURATIONS.md)."""
    reasons = [
        *_renamed(config.scheduler_config),
        *_unproven_processes(config.parallel_config),
        *_unproven_models(config),
        *_unproven_weights(config),
    ]
    if reasons:
        raise UnsupportedHost("edits are not proven exact with: " + "; ".join(reasons))


def _renamed(scheduler_config: Any) -> Iterator[str]:
    """Refuses old names from before the package was called `vllm_edits`."""
    if scheduler_config.scheduler_cls == _OLD_SCHEDULER:
        yield f"--scheduler-cls {_OLD_SCHEDULER}, which was renamed; use --scheduler-cls {SCHEDULER}"


def _unproven_processes(parallel: Any) -> Iterator[str]:
    """Reasons about the division of work among processes."""
    if (size := parallel.pipeline_parallel_size) > 1:
        yield f"pipeline parallel size {size}; start with 1"
    if parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb:
        yield "engines of one data-parallel group behind several servers; start each engine as a separate server"
    if parallel.tensor_parallel_size > 1 and parallel.enable_expert_parallel:
        yield "experts divided among workers; start without --enable-expert-parallel"
    if parallel.use_ubatching:  # the second part would read the token slots of the first
        yield "a batch that is computed in parts; start without --enable-dbo and --ubatch-size"
    if parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        yield "a request's tokens divided among workers; start without --prefill- and --decode-context-parallel-size"


def _unproven_models(config: Any) -> Iterator[str]:
    """Reasons about other models and features that run together with the base model."""
    if config.lora_config is not None:
        yield "LoRA together with edits; start without --enable-lora"
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in SPECULATIVE_METHODS:
        yield (
            f"speculative decoding by {speculative.method!r}; use {' or '.join(SPECULATIVE_METHODS)}, or start without "
            "--speculative-config"
        )
    if optional(speculative, "SpeculativeConfig.enable_adaptive_verification", False):
        yield (
            "adaptive verification of speculated tokens; start without enable_adaptive_verification in "
            "--speculative-config"
        )
    if config.kv_transfer_config is not None:
        yield "a KV cache that other engines share or keep; start without --kv-transfer-config and --kv-offloading-size"
    if config.cache_config.kv_sharing_fast_prefill:
        yield "layers that skip a part of the prompt; start without --kv-sharing-fast-prefill"
    if optional(config.compilation_config.pass_config, "PassConfig.enable_sp", False):  # off by default
        yield "activations divided by tokens among workers; start without enable_sp in --compilation-config"


def _unproven_weights(config: Any) -> Iterator[str]:
    """Reasons about the implementation of the base model and its weights."""
    if config.model_config.model_impl == "transformers":
        yield "a model built by transformers; start without --model-impl"
    if config.model_config.enable_sleep_mode:
        yield "sleep mode, which may drop the content of the slots; start without --enable-sleep-mode"
    if config.weight_transfer_config is not None:
        yield "base weights that are replaced while the server runs; start without --weight-transfer-config"
    if config.quant_config is not None and config.quant_config.get_name() not in QUANTISED:
        yield (
            f"a base model quantised by {config.quant_config.get_name()!r}; serve one of {', '.join(QUANTISED)}, or an "
            "unquantised checkpoint"
        )


def check_reservation(config: Any, base: BaseModelRef, reservation: Reservation) -> None:
    """UnsupportedHost if the reservation is not proven exact with this configuration."""
    if config.parallel_config.tensor_parallel_size > 1 and (why := supported(base.architecture).undivided):
        raise UnsupportedHost(f"{base.architecture} with tensor parallel: {why}. Start with --tensor-parallel-size 1")
    if config.parallel_config.data_parallel_size > 1 and supported(base.architecture).experts:
        raise UnsupportedHost(
            f"edits are not proven exact with {base.architecture} and data parallel, which divides its experts. Start "
            "with --data-parallel-size 1; for more engines, start more servers on the same store"
        )
    if config.speculative_config is not None and reservation.edits_logits:
        raise UnsupportedHost(
            "edits at logits are not proven exact with speculative decoding, because a step computes the logits of "
            "several tokens of a request. Start without --speculative-config, or reserve nothing at logits"
        )


def need(owner: Any, *path: str) -> Any:
    """Follow attributes from `owner`. UnsupportedHost names an attribute that this vLLM does not have."""
    found = owner
    for index, name in enumerate(path):
        if not hasattr(found, name):
            seam = ".".join((type(owner).__name__, *path[: index + 1]))
            raise UnsupportedHost(f"vLLM {vllm.__version__} has no {seam}, which edits need. Use a supported version")
        found = getattr(found, name)
    return found
