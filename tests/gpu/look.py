"""The first look at a GPU: versions, the device, and one kernel of each library against plain torch.

python -m tests.gpu.look
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loadtests.harness.record import about, gpu
from tests.gpu.facts import ended, tell, tried

HOPPER = 9
CLOSE = 0.02
"""Largest difference over the largest number; a wrong kernel is off by about 1."""


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def apart(one: Tensor, other: Tensor) -> dict[str, Any]:
    """How far results are apart."""
    error = float((one.float() - other.float()).abs().max() / other.float().abs().max())
    return {"off": error, "good": error < CLOSE}


def products() -> dict[str, Any]:
    """How fast cuBLAS multiplies: far from what the device is known for, something is wrong with it."""
    x, y, times = random(8192, 8192), random(8192, 8192), 10
    for _ in range(3):
        x @ y
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        x @ y
    torch.cuda.synchronize()
    return {"tera_flops": round(times * 2 * 8192**3 / (time.perf_counter() - began) / 1e12)}


def compiled() -> dict[str, Any]:
    """A kernel that torch's compiler and Triton write."""

    def expression(x: Tensor) -> Tensor:
        return torch.relu(x) * 2 + x.sum(-1, keepdim=True)

    x = random(64, 4096)
    return apart(torch.compile(expression)(x), expression(x))


def norm() -> dict[str, Any]:
    """A kernel of vLLM's own."""
    from vllm import _custom_ops as ops

    x, weight = random(37, 576), random(576)
    out = torch.empty_like(x)
    ops.rms_norm(out, x, weight, 1e-5)
    return apart(out, torch.nn.functional.rms_norm(x.float(), (576,), weight.float(), 1e-5))


def experts() -> dict[str, Any]:
    """One of its library for mixtures of experts."""
    from vllm import _custom_ops as ops

    scores = torch.randn(33, 8, device="cuda")
    weights, ids, rows = (torch.empty(33, 2, device="cuda", dtype=dtype) for dtype in
                          (torch.float32, torch.int32, torch.int32))  # fmt: skip
    ops.topk_softmax(weights, ids, rows, scores)
    return apart(weights, scores.softmax(-1).topk(2).values)


def attention() -> dict[str, Any]:
    """FlashAttention, the version that vLLM takes there, over a paged cache that vLLM's own kernel filled."""
    from vllm import _custom_ops as ops
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    tokens, new, block, heads, shared, width = 40, 3, 16, 8, 2, 64
    key, value, query = random(tokens, shared, width), random(tokens, shared, width), random(new, heads, width)
    cache = torch.zeros(2, 8, block, shared, width, device="cuda", dtype=torch.bfloat16)
    blocks, one = [5, 2, 7], torch.ones(1, device="cuda")
    slots = [blocks[token // block] * block + token % block for token in range(tokens)]
    ops.reshape_and_cache_flash(key, value, cache[0], cache[1], torch.tensor(slots, device="cuda"), "auto", one, one)
    ends, lengths, table = (torch.tensor(each, device="cuda", dtype=torch.int32) for each in
                            ([0, new], [tokens], [blocks]))  # fmt: skip
    out = flash_attn_varlen_func(
        q=query, k=cache[0], v=cache[1], max_seqlen_q=new, cu_seqlens_q=ends, causal=True, max_seqlen_k=tokens,
        seqused_k=lengths, block_table=table, fa_version=3 if torch.cuda.get_device_capability()[0] == HOPPER else 2,
    )  # fmt: skip
    group = heads // shared
    q, k, v = (each.float().transpose(0, 1) for each in
               (query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)))  # fmt: skip
    scores = q @ k.transpose(1, 2) / width**0.5
    later = torch.ones(new, tokens, device="cuda").triu(tokens - new + 1).bool()
    return apart(out, (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(0, 1))


CHECKS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "cuBLAS": products, "torch's compiler and Triton": compiled, "vLLM": norm, "vLLM, experts": experts,
    "FlashAttention": attention,
}  # fmt: skip


def main() -> None:
    """The command."""
    properties = torch.cuda.get_device_properties(0)
    tell("versions", **about()["versions"], cuda=torch.version.cuda, machine=platform.machine(), cores=os.cpu_count())
    tell("device", name=gpu(), gib=round(properties.total_memory / 2**30, 1),
         capability=torch.cuda.get_device_capability(), multiprocessors=properties.multi_processor_count)  # fmt: skip
    worked = [tried("kernel", check, library=library) for library, check in CHECKS.items()]
    ended(all(worked))


if __name__ == "__main__":
    main()
