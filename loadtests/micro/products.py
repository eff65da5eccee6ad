"""How near the products of edits come to what reading costs, no engine: `python -m loadtests.micro.products`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vllm_edits.plugin.graph.cpu_products import compiled
from vllm_edits.plugin.graph.slot_products import SlotProducts

LAYERS, READS, WRITES = 30, 1536, 576
"""Of SmolLM2-135M: edits read `mlp.h` and write to `mlp.out`, at every layer."""
PLAIN = 1 << 28  # bytes that are only read: more than caches hold
app = typer.Typer(add_completion=False)


@app.command()
def main(
    requests: Annotated[int, typer.Option(min=1, help="Requests that decode together, each on its own version.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds. The fastest round counts.")] = 20,
) -> None:
    """Measure the products of a decoding step in bfloat16 on one core, and a sum
    over memory that no cache holds.

    The sum shows the memory bandwidth: the limit for the products.
    """
    torch.set_num_threads(1)
    memory = torch.ones(PLAIN // 4)
    acts: dict[str, tuple[int, Callable[[], object]]] = {"a plain sum of float32": (PLAIN, memory.sum)}
    for rank in (4, 16):
        x, slots, layers = _vectors(requests, rank)
        read = sum(numbers[1:].nbytes for pair in layers for numbers in pair)
        acts[f"the products of rank {rank}"] = read, _step(compiled(), x, slots, layers)
    fastest = dict.fromkeys(acts, float("inf"))
    for _ in range(rounds):
        for name, (_, act) in acts.items():
            began = time.perf_counter()
            act()
            fastest[name] = min(fastest[name], time.perf_counter() - began)
    table = Table("", "MB read", "ms", "GB/s", title=f"{requests} requests on as many versions")
    for name, (size, _) in acts.items():
        table.add_row(name, f"{size / 1e6:.0f}", f"{fastest[name] * 1e3:.2f}", f"{size / fastest[name] / 1e9:.1f}")
    Console().print(table)


def _vectors(requests: int, rank: int) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """What is read, [requests, READS], the slots, and what edits of each layer read and write, as they lie in rows."""
    sizes = [rank * READS, rank * WRITES] * LAYERS
    parts = torch.split(torch.randn(1 + requests, sum(sizes), dtype=torch.bfloat16), sizes, dim=1)
    shaped = [part.view(1 + requests, rank, -1) for part in parts]
    x, slots = torch.randn(requests, READS, dtype=torch.bfloat16), torch.arange(1, 1 + requests, dtype=torch.int32)
    return x, slots, list(zip(shaped[::2], shaped[1::2], strict=True))


def _step(products: SlotProducts, x: Tensor, slots: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    def step() -> None:
        for read, write in layers:
            products.combine(products.dots(x, read, slots), write, slots)

    return step


if __name__ == "__main__":
    app()
