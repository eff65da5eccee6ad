"""Run by test_leaks.py in a process of its own: swap after swap, and what each leaves behind, told as JSON."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from dataclasses import asdict, dataclass

from vllm_edits import Variants
from vllm_edits.edit_store import EditStore

SETTLE, SWAPS, LEAKED = 300, 1000, 8192


@dataclass(frozen=True)
class Look:
    """What this process holds."""

    memory: int
    """bytes that were asked of malloc and not given back, by anyone; what it keeps for later is not among them"""
    blocks: int
    """that Python has allocated"""


_MALLINFO = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _MallInfo(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_size_t) for name in _MALLINFO.split())]


def look() -> Look:
    """By glibc's mallinfo2: of a process that has loaded a model the memory of the system tells nothing, so much of it
    lies free."""
    gc.collect()
    tell = ctypes.CDLL(None).mallinfo2
    tell.restype = _MallInfo
    told = tell()
    return Look(told.uordblks + told.hblkhd, sys.getallocatedblocks())


def main(model: str, store_folder: str, name: str, *versions: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, load_format="edits", additional_config={"edits": {"store": store_folder}}, dtype="float32",
        max_model_len=512, seed=0, enforce_eager=True, kv_cache_memory_bytes=1 << 26,
    )  # fmt: skip
    variants, store, kept = Variants(llm), EditStore(store_folder), list[bytes]()
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)

    def swap(times: int, leaked: int = 0) -> Look:
        for number in range(times):
            version = versions[number % len(versions)]
            store.promote(f"{name}@{version}")
            variants.sync()
            assert variants.coordinator.reconciler.last_swap is not None
            assert variants.coordinator.reconciler.last_swap.to_version == version
            variants.generate(name, [{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
            if leaked:
                kept.append(b"x" * leaked)
        return look()

    looks = [swap(SETTLE), swap(SWAPS), swap(SWAPS // 4, LEAKED)]
    sys.stdout.write(f"\n{json.dumps([asdict(each) for each in looks])}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
