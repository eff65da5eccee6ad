"""The product that edits write, of several ranks, in two ways: as it is, and with the sum over the ranks written out.

    python -m tests.gpu.products

As one sum the compiler makes a reduction of it, which on an H200 read a sixth of what memory gives
(loadtests/README.md, 2026-11-27). Written out, neighbouring outputs are read together. Shapes: Llama 3.2 1B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from tests.gpu.facts import ended, require, tell, tried
from vllm_edits.plugin.graph.slot_products import EXPRESSIONS

TOKENS, HIDDEN, DEVICE = 256, 2048, "cuda"
RANKS = (4, 16, 64)
CLOSE = torch.finfo(torch.bfloat16).eps
"""Largest difference over the largest number: the order of the sum differs, and the last rounding with it."""


def written_out(strengths: Tensor, write: Tensor, slots: Tensor) -> Tensor:
    """The same sum, a term for each rank."""
    rows = write[slots].float()
    out = rows[:, 0] * strengths[:, :1]
    for rank in range(1, rows.shape[1]):
        out = out + rows[:, rank] * strengths[:, rank : rank + 1]
    return out


def behind(product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """As it stands in a layer: added to what the projection gave, then rounded."""

    def added(out: Tensor, strengths: Tensor, write: Tensor, slots: Tensor) -> Tensor:
        return (out.float() + product(strengths, write, slots)).to(out.dtype)

    return torch.compile(added, dynamic=False)


def measured(rank: int, versions: int) -> dict[str, Any]:
    """Microseconds of both, and of reading as much by a copy."""
    torch.manual_seed(rank)
    write = torch.randn(TOKENS + 1, rank, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    out = torch.randn(TOKENS, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    strengths = torch.randn(TOKENS, rank, device=DEVICE)
    slots = 1 + torch.arange(TOKENS, device=DEVICE, dtype=torch.int32) % versions
    ways = {"as one sum": behind(EXPRESSIONS.combine), "written out": behind(written_out)}
    answers = {name: way(out, strengths, write, slots).float() for name, way in ways.items()}
    one, other = answers.values()
    require((one - other).abs().max() <= CLOSE * one.abs().max(), "they differ")
    took = {name: round(1e3 * do_bench(lambda: way(out, strengths, write, slots), return_mode="median"), 1)  # noqa: B023
            for name, way in ways.items()}  # fmt: skip
    read = write[1 : versions + 1].contiguous()
    took["a copy of what is read"] = round(1e3 * do_bench(read.clone, return_mode="median"), 1)
    return {"microseconds": took}


def main() -> None:
    """The command."""
    tell("products", device=torch.cuda.get_device_name())
    worked = [tried("product", lambda: measured(rank, versions), rank=rank, versions=versions)  # noqa: B023
              for rank in RANKS for versions in (1, TOKENS)]  # fmt: skip
    ended(all(worked))


if __name__ == "__main__":
    main()
