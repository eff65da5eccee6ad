"""A weight that vLLM packs on a CPU: for oneDNN, exchanged by its address and told apart by what it makes of vectors;
for AMX, exchanged by its numbers."""

from __future__ import annotations

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from vllm_edits.plugin.vllm_host import weights
from vllm_edits.plugin.vllm_host.weights import PackedWeight, TiledWeight

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="a GPU computes with the parameter itself")


@pytest.fixture
def loaded() -> torch.Tensor:
    current_platform.import_kernels()
    torch.manual_seed(0)
    return torch.randn(64, 32)


def test_two_weights_change_places_and_back(loaded: torch.Tensor) -> None:
    handler = ops.create_onednn_mm(loaded.t(), 32)
    packed, x = PackedWeight(handler, loaded, None), torch.randn(5, 32)
    before, other = ops.onednn_mm(handler, x, None), torch.randn_like(loaded)
    mine, copy = packed.fingerprint(None), packed.copy(other, None)
    theirs = packed.fingerprint(copy)
    assert mine != theirs
    packed.exchange(copy)
    assert (packed.fingerprint(None), packed.fingerprint(copy)) == (theirs, mine)
    torch.testing.assert_close(ops.onednn_mm(handler, x, None), x @ other.T)
    packed.exchange(copy)
    assert packed.fingerprint(None) == mine
    assert torch.equal(ops.onednn_mm(handler, x, None), before)


def test_a_copy_multiplies_nothing_while_the_engine_computes(
    loaded: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All products share one scratch pad, and a copy is made in another thread than the engine's."""
    packed = PackedWeight(ops.create_onednn_mm(loaded.t(), 32), loaded, None)

    def refuse(*_: object) -> None:
        raise AssertionError("a product")

    monkeypatch.setattr(weights.ops, "onednn_mm", refuse)
    assert packed.copy(torch.randn_like(loaded), None).fingerprint is None
    with pytest.raises(AssertionError, match="a product"):
        packed.fingerprint(None)


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX")
@pytest.mark.parametrize("rows", [64, 8])  # fewer than a tile are not packed but turned, in float32
def test_two_weights_in_tiles_change_places_and_back(loaded: torch.Tensor, rows: int) -> None:
    loaded = loaded[:rows].bfloat16()
    other = torch.randn_like(loaded)
    tiles = torch.ops._C.convert_weight_packed(loaded)
    packed, x = TiledWeight(tiles, loaded, torch.zeros(rows)), torch.randn(5, 32).bfloat16()

    def says() -> torch.Tensor:
        return ops.weight_packed_linear_cpu(x, tiles, rows, packed.bias)

    before, mine = says(), packed.fingerprint(None)
    copy = packed.copy(other, torch.ones(rows))
    assert copy.fingerprint == packed.fingerprint(copy) != mine
    theirs = copy.fingerprint
    packed.exchange(copy)
    assert (packed.fingerprint(None), packed.fingerprint(copy)) == (theirs, mine)
    torch.testing.assert_close(says().float(), x.float() @ other.float().T + 1, atol=0.1, rtol=1e-2)
    assert torch.equal(packed.loaded(copy), loaded)
    packed.exchange(copy)
    assert packed.fingerprint(None) == mine
    assert torch.equal(says(), before)
