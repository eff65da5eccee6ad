"""Tokens times the vectors of their slots: both ways to compute that, against numpy, and how the compiled one comes."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_edits.edit_store.edits import Array
from vllm_edits.plugin.graph import cpu_products
from vllm_edits.plugin.graph.cpu_products import compiled, products_for
from vllm_edits.plugin.graph.slot_products import EXPRESSIONS, SlotProducts

CPU = torch.device("cpu")
EPSILON = torch.finfo(torch.float32).eps
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])

both = pytest.mark.parametrize("products", [EXPRESSIONS, compiled()], ids=lambda products: products.name)


def rows_of(slots: int, rank: int, width: int, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Vectors [S, K, width] as columns inside longer rows, as slots hold them; slot 0 is zeros."""
    rows = torch.randn(slots, 64 + rank * width + 32, generator=random).to(dtype)
    rows[0] = 0
    return rows[:, 64 : 64 + rank * width].view(slots, rank, width)


def near(found: Tensor, exact: Array, sizes: Array, terms: int) -> None:
    """Within what adding up so many terms in float32 in any order may lose."""
    assert found.dtype == torch.float32
    assert (np.abs(found.numpy() - exact) <= (terms + 2) * EPSILON * sizes).all()


@both
@given(
    runs=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 11)), min_size=1, max_size=8), rank=st.integers(1, 9),
    width=st.integers(1, 200), dtypes=st.tuples(DTYPES, DTYPES), threads=st.integers(1, 2), seed=st.integers(0, 999),
)  # fmt: skip
def test_both_are_the_formula(
    *, products: SlotProducts, runs: list[tuple[int, int]], rank: int, width: int,
    dtypes: tuple[torch.dtype, torch.dtype], threads: int, seed: int,
) -> None:  # fmt: skip
    """For tokens of any slots in any order, any rank and width, of every type; those of the base get exactly zero."""
    random = torch.Generator().manual_seed(seed)
    slots = torch.tensor([slot for slot, tokens in runs for _ in range(tokens)], dtype=torch.int32)
    x = torch.randn(len(slots), width + 8, generator=random).to(dtypes[0])[:, :width]
    vectors = rows_of(5, rank, width, dtypes[1], random)
    strengths = torch.randn(len(slots), rank, generator=random)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        dots, sums = products.dots(x, vectors, slots), products.combine(strengths, vectors, slots)
    finally:
        torch.set_num_threads(before)
    own = vectors.double().numpy()[slots]
    each = own * x.double().numpy()[:, None, :]
    near(dots, each.sum(-1), np.abs(each).sum(-1), width)
    weighed = own * strengths.double().numpy()[:, :, None]
    near(sums, weighed.sum(1), np.abs(weighed).sum(1), rank)
    assert not dots[slots == 0].any()
    assert not sums[slots == 0].any()
    assert dots[slots != 0].any() == bool((slots != 0).any())


def test_a_long_step_is_divided_among_threads() -> None:
    """What a thread gets begins in the middle of a request, and every token is still its own."""
    random = torch.Generator().manual_seed(1)
    slots = torch.arange(4, dtype=torch.int32).repeat_interleave(257)
    x, vectors = torch.randn(len(slots), 576, generator=random), rows_of(4, 16, 576, torch.bfloat16, random)
    found, expected = compiled().dots(x, vectors, slots), EXPRESSIONS.dots(x, vectors, slots)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_gets_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    """Alone, among others of its slot, or beside other slots: an answer does not depend on who else is in the batch."""
    random = torch.Generator().manual_seed(2)
    x = torch.randn(11, 203, generator=random).to(dtype)
    vectors, strengths = rows_of(3, 7, 203, dtype, random), torch.randn(11, 7, generator=random)
    for company in ([1] * 11, [1, 2] * 5 + [1], [1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 1]):
        slots = torch.tensor(company, dtype=torch.int32)
        dots, sums = compiled().dots(x, vectors, slots), compiled().combine(strengths, vectors, slots)
        for token in range(11):
            one = slice(token, token + 1)
            assert torch.equal(dots[one], compiled().dots(x[one], vectors, slots[one]))
            assert torch.equal(sums[one], compiled().combine(strengths[one], vectors, slots[one]))


def test_what_a_base_token_holds_does_not_matter() -> None:
    """Infinity times the zeros of slot 0 would be NaN."""
    slots = torch.tensor([0, 1], dtype=torch.int32)
    x, vectors = torch.full((2, 32), torch.inf), torch.stack([torch.zeros(2, 32), torch.ones(2, 32)])
    assert compiled().dots(x, vectors, slots).tolist() == [[0, 0], [torch.inf, torch.inf]]


ONE = torch.ones(3, 2, 8)


@pytest.mark.parametrize(
    ("x", "vectors", "slots", "reason"),
    [
        (torch.ones(2, 8), ONE, [0, 3], "token 1 is of slot 3 of 3"),
        (torch.ones(2, 8), ONE, [-1, 0], "token 0 is of slot -1 of 3"),
        (torch.ones(2, 8), ONE, [0], "a slot for each of 2 tokens"),
        (torch.ones(2, 9), ONE, [0, 1], "vectors of 8 numbers cannot read 9"),
        (torch.ones(2, 8), torch.ones(3, 8, 2).transpose(1, 2), [0, 1], "each slot's in one piece"),
        (torch.ones(2, 8).half(), ONE, [0, 1], "expected float32 or bfloat16, found Half"),
        (torch.ones(8, 2).T, ONE, [0, 1], "expected .tokens, width."),
    ],
)
def test_what_would_be_read_from_elsewhere_is_refused(x: Tensor, vectors: Tensor, slots: Any, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        compiled().dots(x, vectors, torch.tensor(slots, dtype=torch.int32))


def test_elsewhere_than_on_a_cpu_expressions_serve() -> None:
    assert products_for(torch.device("meta"), torch.bfloat16) is EXPRESSIONS
    assert products_for(CPU, torch.float16) is EXPRESSIONS
    assert products_for(CPU, torch.bfloat16) is compiled()


@pytest.mark.parametrize(
    ("compiler", "said"),
    [("/nowhere/g++", "No such file"), ("false", "returned non-zero exit status 1")],
)
def test_without_a_compiler_expressions_serve_and_the_log_says_what_is_missing(
    compiler: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpu_products, "compiled", compiled.__wrapped__)
    with caplog.at_level(logging.WARNING, logger="vllm.edits"):
        assert products_for(CPU, torch.float32) is EXPRESSIONS
    assert said in caplog.text
    assert "CXX" in caplog.text
    assert list((tmp_path / "vllm_edits").iterdir()) == [], "nothing half made is left"


@pytest.mark.long
def test_processes_that_start_together_all_get_the_library(tmp_path: Path) -> None:
    """Workers of one engine compile at the same time; who comes later finds what was kept, and needs no compiler."""
    script = "from vllm_edits.plugin.graph.cpu_products import compiled; print(compiled().name)"
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    starting = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in starting] == ["compiled", "compiled"]
    (library,) = (tmp_path / "vllm_edits").iterdir()
    made = library.stat().st_mtime_ns
    again = subprocess.run(
        [sys.executable, "-c", script], env={**environment, "PATH": ""}, capture_output=True, text=True, check=True
    )
    assert again.stdout.strip() == "compiled"
    assert library.stat().st_mtime_ns == made
