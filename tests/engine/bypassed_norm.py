"""Run by test_start.py in a process of its own: a vLLM whose attention has a norm and never calls its forward."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from vllm_edits.edit_store.errors import UnsupportedHost


def main(model: str, store: str) -> None:
    from vllm import LLM
    from vllm.model_executor.models import qwen3

    def start() -> Any:
        return LLM(
            model, load_format="edits", additional_config={"edits": {"store": store}}, dtype="float32",
            max_model_len=128, enforce_eager=True, skip_tokenizer_init=True,
        )  # fmt: skip

    class Fused(qwen3.RMSNorm):  # type: ignore[misc]
        """As a fused kernel has it: the weight is read, and the module is not called."""

        def __call__(self, *args: Any) -> Any:
            return super().forward_native(*args)

    qwen3.RMSNorm, norm = Fused, qwen3.RMSNorm
    with pytest.raises(UnsupportedHost, match=r"found layers\.0\.q\.out \(0 times\)"):
        start()
    qwen3.RMSNorm = norm
    start()
    sys.stdout.write("the story holds\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
