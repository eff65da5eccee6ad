"""The oracle itself: edits by hooks are what the papers do to the weights, on every architecture.

Where a weight lies, and which part of a fused one, is written down here once more, so that the table cannot be wrong
unseen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.proofs.parity import random_numbers
from tests.support.tiny_models import make_tiny
from vllm_edits.edit_store import BaseModelRef, LowRank, Offset, Scale, SubspaceFilter, WeightDelta, identify
from vllm_edits.edit_store.architectures import ARCHITECTURES
from vllm_edits.edit_store.authoring.formula import edited
from vllm_edits.edit_store.sites import READS

LAYER = "layers.1."
IDS = torch.tensor([[5, 17, 99, 3, 42, 8, 120, 7]])
_ALONE = {
    "q.out": "self_attn.q_proj", "q.proj": "self_attn.q_proj", "k.out": "self_attn.k_proj",
    "k.proj": "self_attn.k_proj", "v.out": "self_attn.v_proj", "attn.out": "self_attn.o_proj",
    "gate.out": "mlp.gate_proj", "up.out": "mlp.up_proj", "mlp.out": "mlp.down_proj",
}  # fmt: skip


class Host:
    """A tiny model in float64 with access to its weights as [out, in]."""

    def __init__(self, folder: Path) -> None:
        self.base: BaseModelRef = identify(folder)
        plainly = {"attn_implementation": "eager", "experts_implementation": "eager"}
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **plainly).eval()

    def weight(self, point: str) -> Tensor:
        """The weight behind an output, as a view that can be written."""
        widths, name = self.base.widths, self.base.architecture
        q, k, m = widths.of("q.out"), widths.of("k.out"), widths.mlp
        if name == "GPT2LMHeadModel":
            parameters = dict(self.model.transformer.h[1].named_parameters())
            columns = {"q.out": slice(0, q), "k.out": slice(q, 2 * q), "v.out": slice(2 * q, 3 * q)}
            module = {"attn.out": "attn.c_proj", "up.out": "mlp.c_fc", "mlp.out": "mlp.c_proj"}.get(
                point, "attn.c_attn"
            )
            return parameters[f"{module}.weight"][:, columns.get(point, slice(None))].T
        parameters = dict(self.model.model.layers[1].named_parameters())
        if name == "Phi3ForCausalLM" and point not in {"attn.out", "mlp.out"}:
            rows = {"q.out": slice(0, q), "k.out": slice(q, q + k), "v.out": slice(q + k, q + 2 * k),
                    "gate.out": slice(0, m), "up.out": slice(m, 2 * m)}[point]  # fmt: skip
            return parameters["mlp.gate_up_proj.weight" if point[0] in "gu" else "self_attn.qkv_proj.weight"][rows]
        return parameters[f"{_ALONE[point]}.weight"]

    @contextmanager
    def changed(self, weight: Tensor, change: Tensor) -> Iterator[None]:
        with torch.no_grad():
            before = weight.clone()
            weight += change
            yield
            weight.copy_(before)

    @torch.no_grad()
    def says(self) -> Tensor:
        logits: Tensor = self.model(IDS, use_cache=False).logits
        return logits


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Host]:
    return {name: Host(make_tiny(name, tmp_path_factory.mktemp(name))) for name in ARCHITECTURES}


def linear_points() -> Iterator[Any]:
    for name, architecture in ARCHITECTURES.items():
        for point, (reads, *_) in READS.items():
            normed = architecture.qk_norm and point in {"q.out", "k.out"}
            if point != "logits" and not normed and not architecture.hidden(point) and not architecture.hidden(reads):
                yield pytest.param(name, point, id=f"{name}-{point}")


@pytest.mark.parametrize(("name", "point"), list(linear_points()))
def test_a_low_rank_edit_is_an_update_of_the_weight(hosts: dict[str, Host], name: str, point: str) -> None:
    """W + write^T read: ROCR, ROME, MEMIT, Model Surgery, LoRA."""
    host = hosts[name]
    edit = LowRank(site=LAYER + point, reads=LAYER + READS[point][0], rank=2)
    numbers = random_numbers(edit, host.base, 3)
    read, write = (torch.from_numpy(numbers[field]).double() for field in ("read", "write"))
    with host.changed(host.weight(point), write.T @ read):
        in_weights = host.says()
    with edited(host.model, [(edit, numbers)]):
        by_hooks = host.says()
    torch.testing.assert_close(by_hooks, in_weights, rtol=1e-9, atol=1e-9)
    assert (by_hooks - host.says()).abs().max() > 1e-3


def test_a_weight_delta_is_added_to_the_weight_dense_or_sparse(hosts: dict[str, Host]) -> None:
    """LocFT-BF and SaRA; an index pair may lie anywhere, and a row may be met twice."""
    host = hosts["LlamaForCausalLM"]
    weight = host.weight("mlp.out")
    rows, columns, values = np.array([0, 2, 2]), np.array([5, 0, 7]), np.array([1.5, -2.0, 0.5])
    delta = np.zeros(weight.shape)
    delta[rows, columns] = values
    where: Any = {"site": LAYER + "mlp.out", "reads": LAYER + "mlp.h"}
    sparse = (WeightDelta(**where, layout="sparse", count=3), {"rows": rows, "columns": columns, "values": values})
    dense = (WeightDelta(**where), {"delta": delta})
    with host.changed(weight, torch.from_numpy(delta)):
        in_weights = host.says()
    for edit, fields in (sparse, dense):
        with edited(host.model, [(edit, fields)]):
            torch.testing.assert_close(host.says(), in_weights, rtol=1e-9, atol=1e-9)
        x, y = np.ones((2, delta.shape[1])), np.ones((2, delta.shape[0]))
        np.testing.assert_allclose(edit.apply(x, y, **fields), y + x @ delta.T)
    assert (in_weights - host.says()).abs().max() > 1e-3, "positive control"


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_undifferentiated_attention_scales_the_rows_of_the_query_weight(hosts: dict[str, Host], name: str) -> None:
    """Ships: rows of a head times epsilon. A bias is scaled by the edit; an offset of (1 - factor) bias keeps it."""
    host = hosts[name]
    factor = np.array([1.0, 1e-5, 1.0, 0.3], dtype=np.float32)
    rows = torch.from_numpy(factor).double().repeat_interleave(host.base.widths.head_dim)
    weight = host.weight("q.out")
    with host.changed(weight, weight * (rows[:, None] - 1)):
        in_weights = host.says()
    edits: list[Any] = [(Scale(site=LAYER + "q.out", bias="scaled"), {"factor": factor})]
    biased = name == "Qwen2ForCausalLM"
    assert biased == ("q.out" in host.base.biased)
    if biased:
        with edited(host.model, edits):
            assert (host.says() - in_weights).abs().max() > 1e-4, "positive control: the bias matters"
        bias = host.model.model.layers[1].self_attn.q_proj.bias.detach()
        edits.append((Offset(site=LAYER + "q.out"), {"vector": ((1 - rows) * bias).numpy()}))
    with edited(host.model, edits):
        torch.testing.assert_close(host.says(), in_weights, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "same"), [("LlamaForCausalLM", True), ("Olmo2ForCausalLM", False)])
def test_orthogonalised_writers_are_an_ablated_stream_unless_norms_stand_between(
    hosts: dict[str, Host], name: str, same: bool
) -> None:
    """Abliteration: (I - r r^T) W for every writer is a filter of the stream; with post-norms it is not."""
    host = hosts[name]
    direction = np.linalg.qr(np.random.default_rng(0).normal(size=(host.base.widths.hidden, 1)))[0].T
    project = torch.from_numpy(direction.T @ direction)
    layers = host.model.model.layers
    writers = [host.model.model.embed_tokens.weight.T, *(layer.self_attn.o_proj.weight for layer in layers),
               *(layer.mlp.down_proj.weight for layer in layers)]  # fmt: skip
    with ExitStack() as changes:
        for weight in writers:
            changes.enter_context(host.changed(weight, -project @ weight))
        in_weights = host.says()
    sites = ["embed.out", *(f"layers.{layer}.resid" for layer in range(host.base.widths.layers))]
    middle = [f"layers.{layer}.attn.out" for layer in range(host.base.widths.layers)]  # joins the stream within a layer
    numbers = {"basis": direction, "mean": np.zeros(host.base.widths.hidden)}
    with edited(host.model, [(SubspaceFilter(site=site, rank=1), numbers) for site in (*sites, *middle)]):
        apart = float((host.says() - in_weights).abs().max())
    assert (apart < 1e-9) == same, apart


def test_a_stealth_edit_in_place_is_one_neuron_read_and_written_anew(hosts: dict[str, Host]) -> None:
    """Replacing a gate row and a down column: the edit of the down projection sees the edited gate."""
    host = hosts["LlamaForCausalLM"]
    neuron, widths = 7, host.base.widths
    random = np.random.default_rng(1)
    new_row, new_column = random.normal(size=widths.hidden), random.normal(size=widths.hidden)
    gate, down = host.weight("gate.out"), host.weight("mlp.out")
    unit = np.zeros((1, widths.mlp))
    unit[0, neuron] = 1
    row, column = new_row - gate[neuron].detach().numpy(), new_column - down[:, neuron].detach().numpy()
    with (
        host.changed(gate, torch.from_numpy(unit.T * row)),
        host.changed(down, torch.from_numpy(column[:, None] * unit)),
    ):
        in_weights = host.says()
    edits = [
        (LowRank(site=LAYER + "gate.out", reads=LAYER + "mlp.in", rank=1), {"read": row[None], "write": unit}),
        (LowRank(site=LAYER + "mlp.out", reads=LAYER + "mlp.h", rank=1), {"read": unit, "write": column[None]}),
    ]
    with edited(host.model, edits):
        torch.testing.assert_close(host.says(), in_weights, rtol=1e-9, atol=1e-9)


def test_an_offset_of_heads_is_a_bias_of_the_output_projection(hosts: dict[str, Host]) -> None:
    """LoFiT and ITI: b = W_O v, so nothing needs to be projected when it stands at attn.z."""
    host = hosts["GPT2LMHeadModel"]
    edit = Offset(site=LAYER + "attn.z")
    numbers = random_numbers(edit, host.base, 2)
    bias = host.model.transformer.h[1].attn.c_proj.bias
    with host.changed(bias, host.weight("attn.out") @ torch.from_numpy(numbers["vector"]).double()):
        in_weights = host.says()
    with edited(host.model, [(edit, numbers)]):
        torch.testing.assert_close(host.says(), in_weights, rtol=1e-9, atol=1e-9)
