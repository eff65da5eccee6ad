"""How many kernels edits add to a step on an NVIDIA H100, counted in what torch's compiler writes for one.

    python -m loadtests.micro.gpu_kernels [SIDE …] [--compile] [--json]

No GPU is needed, none is used, and nothing is measured: a kernel that is not written cannot be launched, and that is
all this says. The model has layers of Llama 3.2 1B as vLLM computes them, with attention as an operator. Counted are
the compiler's kernels, beside products and attention, which edits do not change.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, library, nn

from loadtests.bench.inputs import edits_everywhere
from loadtests.micro import gpu_compiler
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.bundle import Strength
from vllm_edits.edit_store.edits import Edit
from vllm_edits.edit_store.kinds import served_per_request
from vllm_edits.edit_store.sites import Widths
from vllm_edits.plugin.graph.edited_model import EditedModel
from vllm_edits.plugin.graph.reservation import Reservation
from vllm_edits.plugin.vllm_host.architectures import site_modules

ARCHITECTURE, DTYPE, META = "LlamaForCausalLM", torch.bfloat16, torch.device("meta")
SLOTS, MOST_TOKENS, TOKENS = 64, 2048, 256
SIDES: dict[str, tuple[Sequence[str], int]] = {
    "plain": ((), 1),
    **{kind: ((kind,), 1) for kind in served_per_request()},
    "low_rank, rank 4": (("low_rank",), 4),
    "low_rank, rank 16": (("low_rank",), 16),
    "all kinds": (served_per_request(), 1),
    "all kinds, rank 4": (served_per_request(), 4),
}
"""The kinds that are reserved at every layer, and their rank."""


@dataclass(frozen=True)
class Kernels:
    """Of one side."""

    a_layer: int
    once: int
    """in a step, whatever the number of layers"""
    compiled: int | None = None
    """how many different ones became machine code, where that was asked for"""


def kernels(side: str, *, compile_them: bool = False) -> Kernels:
    """Those of a step. Two models that differ by a layer tell what belongs to a layer: of two layers and three, since
    what gates that fire are summed up in is written otherwise where there is only one."""
    kinds, rank = SIDES[side]
    fewer, more = (gpu_compiler.written_for(*_edited(layers, kinds, rank)) for layers in (2, 3))
    counts = [sum(call in written.kernels for call in written.calls) for written in (fewer, more)]
    a_layer = counts[1] - counts[0]
    return Kernels(a_layer, counts[0] - 2 * a_layer, len(more.compile()) if compile_them else None)


@dataclass(frozen=True)
class _AskedKernels:
    """What a version asks of a server."""

    edits: Sequence[Edit]
    strength: Strength | None = None


def _edited(layers: int, kinds: Sequence[str], rank: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A model with capacity for these kinds, and what it is called with."""
    widths = Widths(layers=layers, hidden=2048, mlp=8192, heads=32, kv_heads=8, head_dim=64, vocab=128256)
    base = BaseModelRef(name="1b", architecture=ARCHITECTURE, widths=widths, files={"model.safetensors": "0" * 64})
    with META:
        model = _Model(widths)
        if kinds:
            asked = _AskedKernels([edit for edit, _ in edits_everywhere(base, kinds, rank)])
            EditedModel(
                site_modules(model, ARCHITECTURE, widths), Reservation.for_versions([asked]),
                slots=SLOTS, max_tokens=MOST_TOKENS, dtype=DTYPE, device=META,
            ).attach()  # fmt: skip
        angles = torch.empty(TOKENS, 1, widths.head_dim // 2, dtype=DTYPE)
        return model, torch.empty(TOKENS, widths.hidden, dtype=DTYPE), angles, torch.empty_like(angles)


@library.custom_op("vllm_edits_loadtests::attend", mutates_args=("out",))
def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Stands where vLLM calls attention, which no compiler sees into."""


_attend.register_fake(lambda *_: None)


class _Projection(nn.Module):
    def __init__(self, reads: int, writes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(writes, reads, dtype=DTYPE), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(x, self.weight), None


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=DTYPE), requires_grad=False)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = hidden.float() if residual is None else hidden.float() + residual.float()
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return normed.to(DTYPE) * self.weight, x.to(DTYPE)


class _Attention(nn.Module):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.parts = [widths.of(point) for point in ("q.out", "k.out", "v.out")]
        self.head_dim = widths.head_dim
        self.qkv_proj = _Projection(widths.hidden, sum(self.parts))
        self.o_proj = _Projection(widths.of("attn.z"), widths.hidden)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(hidden_states)[0].split(self.parts, -1)
        out = torch.empty(*q.shape, dtype=q.dtype, device=q.device)
        _attend(self._turned(q, cos, sin), self._turned(k, cos, sin), v, out)
        output: Tensor = self.o_proj(out)[0]
        return output

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.view(x.shape[0], -1, self.head_dim).chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)


class _MLP(nn.Module):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.gate_up_proj = _Projection(widths.hidden, 2 * widths.mlp)
        self.down_proj = _Projection(widths.mlp, widths.hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, -1)
        output: Tensor = self.down_proj(nn.functional.silu(gate) * up)[0]
        return output


class _Layer(nn.Module):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(widths), _MLP(widths)
        self.input_layernorm, self.post_attention_layernorm = _Norm(widths.hidden), _Norm(widths.hidden)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden, stream = self.input_layernorm(hidden_states, residual)
        hidden = self.self_attn(hidden_states=hidden, cos=cos, sin=sin)
        hidden, stream = self.post_attention_layernorm(hidden, stream)
        return self.mlp(hidden), stream


class _Model(nn.Module):
    """Laid out like vLLM's Llama, so that the table of architectures finds its sites."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.model: Any = nn.Module()
        self.model.layers = nn.ModuleList(_Layer(widths) for _ in range(widths.layers))
        self.model.norm = _Norm(widths.hidden)
        self.lm_head, self.logits_processor = nn.Module(), nn.Module()

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        residual: Tensor | None = None
        for layer in self.model.layers:
            hidden, residual = layer(hidden, residual, cos, sin)
        final: Tensor = self.model.norm(hidden, residual)[0]
        return final


def _table(found: dict[str, Kernels]) -> Table:
    table = Table(title=f"Kernels that torch's compiler writes for an {gpu_compiler.DEVICE}, none of them run")
    columns: dict[str, Callable[[Kernels], object]] = {
        "a layer": lambda kernels: kernels.a_layer,
        "once a step": lambda kernels: kernels.once,
        "made machine code": lambda kernels: "" if kernels.compiled is None else kernels.compiled,
    }
    for header in ("reserved at every layer", *columns):
        table.add_column(header)
    for side, kernels_of in found.items():
        table.add_row(side, *(str(column(kernels_of)) for column in columns.values()))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.micro.gpu_kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("sides", nargs="*", metavar="SIDE", help=f"default: all of {'; '.join(SIDES)}")
    parser.add_argument(
        "--compile", action="store_true", help="also compile the kernels to machine code, which may fail"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if unknown := set(options.sides) - set(SIDES):
        parser.error(f"there are no sides {sorted(unknown)}, there are {list(SIDES)}")
    gpu_compiler.pretend()
    found = {side: kernels(side, compile_them=options.compile) for side in options.sides or SIDES}
    if options.json:
        print(json.dumps({side: asdict(each) for side, each in found.items()}))
    else:
        Console().print(_table(found))


if __name__ == "__main__":
    main()
