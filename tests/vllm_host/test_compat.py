"""Which ways of running vLLM are refused before anything is served, and with what reason."""

from __future__ import annotations

from functools import reduce
from types import SimpleNamespace
from typing import Any

import pytest

from tests.proofs.parity import random_numbers
from tests.support.bundles import bundle_of
from tests.support.fakes import BASE
from vllm_edits.edit_store import Offset, Site
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.graph.reservation import Reservation
from vllm_edits.plugin.vllm_host.compat import check_config, check_reservation


def config(**changes: Any) -> Any:
    """As much of vLLM's config as is looked at: the usual way of running, but for these; `a__b` is b of a."""
    sizes = ("tensor", "pipeline", "data", "prefill_context", "decode_context")
    made = SimpleNamespace(
        parallel_config=SimpleNamespace(
            **{f"{size}_parallel_size": 1 for size in sizes},
            enable_expert_parallel=False, data_parallel_external_lb=False, data_parallel_hybrid_lb=False,
            use_ubatching=False,
        ),
        model_config=SimpleNamespace(enable_sleep_mode=False, model_impl="auto"),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace()),
        scheduler_config=SimpleNamespace(scheduler_cls=None),
        lora_config=None, speculative_config=None, quant_config=None, weight_transfer_config=None,
        kv_transfer_config=None,
    )  # fmt: skip
    for path, value in changes.items():
        *owners, name = path.split("__")
        setattr(reduce(getattr, owners, made), name, value)
    return made


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"parallel_config__tensor_parallel_size": 2}, None),
        (
            {"parallel_config__tensor_parallel_size": 2, "parallel_config__enable_expert_parallel": True},
            "start without --enable-expert-parallel",
        ),
        ({"scheduler_config__scheduler_cls": "vllm_edits.EditsScheduler"}, None),
        (
            {"scheduler_config__scheduler_cls": "plugin.vllm_host.scheduler.EditsScheduler"},
            "use --scheduler-cls vllm_edits.EditsScheduler",
        ),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallel size 2; start with 1"),
        ({"parallel_config__data_parallel_size": 4}, None),
        ({"parallel_config__data_parallel_external_lb": True}, "start each engine as a separate server"),
        ({"parallel_config___api_process_count": 2}, None),
        ({"parallel_config__use_ubatching": True}, "start without --enable-dbo"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "start without --prefill- and --decode-context"),
        ({"parallel_config__decode_context_parallel_size": 2}, "start without --prefill- and --decode-context"),
        ({"kv_transfer_config": object()}, "start without --kv-transfer-config"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "start without --kv-sharing-fast-prefill"),
        ({"compilation_config__pass_config__enable_sp": True}, "start without enable_sp"),
        ({"compilation_config__pass_config__enable_sp": False}, None),
        (
            {"speculative_config": SimpleNamespace(method="draft_model", enable_adaptive_verification=True)},
            "start without enable_adaptive_verification",
        ),
        ({"lora_config": object()}, "start without --enable-lora"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "speculative decoding by 'eagle'"),
        ({"speculative_config": SimpleNamespace(method="ngram")}, None),
        ({"model_config__enable_sleep_mode": True}, "start without --enable-sleep-mode"),
        ({"model_config__model_impl": "transformers"}, "start without --model-impl"),
        ({"model_config__model_impl": "vllm"}, None),
        ({"weight_transfer_config": object()}, "start without --weight-transfer-config"),
        (
            {"quant_config": SimpleNamespace(get_name=lambda: "fp8")},
            "quantised by 'fp8'; serve one of compressed-tensors",
        ),
        ({"quant_config": SimpleNamespace(get_name=lambda: "compressed-tensors")}, None),
        ({}, None),
    ],
)
def test_what_is_not_proven_exact_is_refused_with_what_to_do(changes: dict[str, Any], why: str | None) -> None:
    if why is None:
        check_config(config(**changes))
    else:
        with pytest.raises(UnsupportedHost) as refusal:
            check_config(config(**changes))
        assert why in str(refusal.value)


def test_all_reasons_are_told_at_once() -> None:
    with pytest.raises(UnsupportedHost, match=r"pipeline parallel size 2.*; LoRA together with edits.*; sleep mode"):
        check_config(
            config(
                parallel_config__pipeline_parallel_size=2, lora_config=object(), model_config__enable_sleep_mode=True
            )
        )


def test_logits_are_not_edited_while_tokens_are_guessed() -> None:
    """Other sites are."""
    guessing = config(speculative_config=SimpleNamespace(method="ngram"))
    for point, refused in ((Site(None, "logits"), True), (Site(1, "resid"), False)):
        edit = Offset(site=str(point))
        reservation = Reservation.for_versions(
            [bundle_of("polite", BASE, [(edit, random_numbers(edit, BASE, 0))]).manifest]
        )
        check_reservation(config(), BASE, reservation)
        if refused:
            with pytest.raises(UnsupportedHost, match="Start without --speculative-config"):
                check_reservation(guessing, BASE, reservation)
        else:
            check_reservation(guessing, BASE, reservation)


def test_what_workers_that_divide_a_model_cannot_do_is_refused() -> None:
    """Models that vLLM divides otherwise than the others."""
    divided, nothing = config(parallel_config__tensor_parallel_size=2), Reservation({})
    check_reservation(divided, BASE, nothing)
    olmo = BASE.model_copy(update={"architecture": "Olmo2ForCausalLM"})
    check_reservation(config(), olmo, nothing)
    with pytest.raises(UnsupportedHost, match="norms of queries and keys go over all heads"):
        check_reservation(divided, olmo, nothing)
    copied = config(parallel_config__data_parallel_size=2)
    check_reservation(copied, BASE, nothing)
    with pytest.raises(UnsupportedHost, match="which divides its experts"):
        check_reservation(copied, BASE.model_copy(update={"architecture": "Qwen3MoeForCausalLM"}), nothing)
