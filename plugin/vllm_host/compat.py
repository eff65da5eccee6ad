"""Which vLLM this plugin supports, and what it refuses to run with. Checked before anything is served."""

from __future__ import annotations

from typing import Any

import vllm
from packaging.version import Version

from edit_store.errors import UnsupportedHost
from plugin.reservation import Reservation

LOAD_FORMAT = "edits"
PLUGIN_NAME = "edits"

SUPPORTED_VLLM = (Version("0.26"), Version("0.34"))
"""From the first version with every seam up to, not including, the first not yet looked at."""
QUANTISED = ("compressed-tensors",)
"""Ways of quantising the base model under which edits, which stay in full precision around it, are proven."""


def check_version() -> None:
    """UnsupportedHost outside the supported range."""
    low, high = SUPPORTED_VLLM
    found = Version(vllm.__version__)
    if not low <= Version(found.base_version) < high:
        raise UnsupportedHost(
            f"vllm-edits supports vLLM {low} up to (not including) {high}, found {found}. Install one of these"
        )


def check_config(config: Any) -> None:
    """UnsupportedHost, with all reasons, for ways of running that are not proven exact: see tests/CONFIGURATIONS.md."""
    parallel, reasons = config.parallel_config, []
    for name, size in (
        ("tensor parallel", parallel.tensor_parallel_size),
        ("pipeline parallel", parallel.pipeline_parallel_size),
        ("data parallel", parallel.data_parallel_size),
    ):
        if size > 1:
            reasons.append(f"{name} size {size}; start with 1")
    if (processes := getattr(parallel, "_api_process_count", 1)) > 1:
        reasons.append(
            f"{processes} API server processes, each of which would give the same slots to other versions; start with "
            "--api-server-count 1, and for more of them another server on the same store"
        )
    if config.lora_config is not None:
        reasons.append("LoRA beside edits; start without --enable-lora")
    speculative = config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        reasons.append(
            f"speculative decoding by {speculative.method!r}, whose own model is not edited; use the method ngram, or "
            "start without --speculative-config"
        )
    if config.model_config.enable_sleep_mode:
        reasons.append("sleep mode, which may drop what the slots hold; start without --enable-sleep-mode")
    if getattr(config, "weight_transfer_config", None) is not None:
        reasons.append("base weights that are replaced while it runs; start without --weight-transfer-config")
    if config.quant_config is not None and config.quant_config.get_name() not in QUANTISED:
        reasons.append(
            f"a base model quantised by {config.quant_config.get_name()!r}; serve one of {', '.join(QUANTISED)}, or an "
            "unquantised checkpoint"
        )
    if reasons:
        raise UnsupportedHost("edits are not proven exact with: " + "; ".join(reasons))


def check_reservation(config: Any, reservation: Reservation) -> None:
    """UnsupportedHost for room that this way of running has no exact use for."""
    if config.speculative_config is not None and any(site.point == "logits" for site in reservation.sites()):
        raise UnsupportedHost(
            "edits at logits are not proven exact with speculative decoding, where a step wants the logits of more "
            "than its last tokens: start without --speculative-config, or without what reserves room there"
        )


def need(owner: Any, *path: str) -> Any:
    """Follow attributes from `owner`; UnsupportedHost names the seam that this vLLM no longer has."""
    found = owner
    for index, name in enumerate(path):
        if not hasattr(found, name):
            seam = ".".join((type(owner).__name__, *path[: index + 1]))
            raise UnsupportedHost(
                f"vLLM {vllm.__version__} has no {seam}, which edits lean on. Use a supported version"
            )
        found = getattr(found, name)
    return found
