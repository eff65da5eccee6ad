"""Projections as a model's files hold them are those that transformers computes with, for every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import make_tiny
from vllm_edits.edit_store import Site, identify
from vllm_edits.edit_store.architectures import ARCHITECTURES, supported
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.weights.checkpoint import Checkpoint

TOKENS = torch.tensor([[5, 9, 3, 44]])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_projection_gives_what_its_module_gives(name: str, tmp_path: Path) -> None:
    """Fused and alone, transposed, with a bias and without."""
    folder = make_tiny(name, tmp_path)
    base, architecture = identify(folder), supported(name)
    checkpoint = Checkpoint(folder, architecture, base.widths)
    host = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = dict(host.named_modules())
    compared = 0
    for point in architecture.projections():
        site = Site(1, point)
        weight, bias = checkpoint.projection(site)
        layer = architecture.layer_path(1)
        at = architecture.side_of(point, base.widths, lambda path, layer=layer: f"{layer}.{path}" in modules)
        seen: list[torch.Tensor] = []
        hook = modules[f"{layer}.{at.path}"].register_forward_hook(
            lambda _, given, gave, seen=seen: seen.extend([given[0], gave])
        )
        with torch.no_grad():
            host(TOKENS)
        hook.remove()
        start, width = at.start or 0, base.widths.of(point)
        expected = seen[1][..., start : start + width]
        found = seen[0] @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        compared += 1
    assert compared >= 4


def test_files_that_leave_out_what_holds_the_decoder_are_read_too(tmp_path: Path) -> None:
    """As GPT-2's own files do."""
    folder = make_tiny("GPT2LMHeadModel", tmp_path)
    base, architecture = identify(folder), supported("GPT2LMHeadModel")
    expected = Checkpoint(folder, architecture, base.widths).projection(Site(0, "mlp.out"))
    tensors = load_file(folder / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(short, folder / "model.safetensors", {"format": "pt"})
    found = Checkpoint(folder, architecture, base.widths).projection(Site(0, "mlp.out"))
    assert all(map(torch.equal, found, expected))


def test_files_without_the_projection_are_refused(tmp_path: Path) -> None:
    folder = make_tiny("LlamaForCausalLM", tmp_path)
    widths = identify(folder).widths
    with pytest.raises(UnsupportedHost, match=r"holds no h.0.mlp.c_proj.weight, which gives layers.0.mlp.out"):
        Checkpoint(folder, supported("GPT2LMHeadModel"), widths).projection(Site(0, "mlp.out"))
