"""Run by test_probes.py in a process of its own: edits that are installed and counted, and do nothing, are found."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from vllm_edits import Variants
from vllm_edits.edit_store import EditStore
from vllm_edits.plugin.graph.site_edits import SiteEdits


def main(model: str, store_folder: str, version: str) -> None:
    from vllm import LLM

    settings = {"store": store_folder, "reserve": [{"kind": "offset", "site": "layers.*.resid"}]}
    llm = LLM(
        model, load_format="edits", additional_config={"edits": settings}, dtype="float32", max_model_len=256,
        enforce_eager=True, kv_cache_memory_bytes=1 << 26,
    )  # fmt: skip
    variants, store = Variants(llm), EditStore(store_folder)
    store.promote(f"loud@{version}")
    forward = SiteEdits.forward

    def nothing(_self: SiteEdits, value: Tensor) -> Tensor:
        return torch.zeros_like(value.float())

    SiteEdits.forward = nothing  # type: ignore[method-assign]
    variants.sync()
    swap = variants.coordinator.reconciler.last_swap
    assert swap is not None
    assert "0% of the change that its author recorded is there" in swap.error, swap.error
    assert not variants.coordinator.reconciler.table.promoted
    SiteEdits.forward = forward  # type: ignore[method-assign]
    variants.sync()
    assert variants.coordinator.reconciler.table.promoted == {"loud": {"prod": version}}
    run = variants.coordinator.prober.last[version]
    assert run.result == "passed"
    assert abs(run.worst.share - 1) < 0.02, run.worst
    sys.stdout.write("the story holds\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
