"""A model that workers divide among them: edits are the same as in one that nobody divides."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.proofs.parity import random_numbers
from tests.support.edited_models import TOKENS, bundle_of, by_formula, crowded, reservation_of
from tests.support.every_form import for_every_form
from tests.support.fakes import BASE, WIDTHS, RequestStep, TinyModel, divided, edited_model, plain_weights, set_step
from vllm_edits.edit_store import Bundle, Gate, LowRank, Offset, Scale, Site, SubspaceFilter, check
from vllm_edits.edit_store.architectures import ARCHITECTURES
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.graph.edited_model import EditedModel
from vllm_edits.plugin.graph.slot_bytes import slot_bytes
from vllm_edits.plugin.graph.tensor_parallel import AllReduce, Rank, Shard, identity
from vllm_edits.plugin.vllm_host.architectures import site_modules
from vllm_edits.plugin.weights.weight_form import formless, touched

WORKERS = 2
PER_LAYER = 2
"""sums over workers that the model itself makes: after attention and after the MLP"""


class Sums:
    """The sums over workers, each in a thread, added in the order of their ranks; how many there have been."""

    def __init__(self) -> None:
        self.made = 0
        self._parts: list[Any] = [None] * WORKERS
        self._barrier = threading.Barrier(WORKERS, timeout=30)

    def of(self, rank: int) -> AllReduce:
        """The `AllReduce` of one worker."""

        def add(partial: Tensor) -> Tensor:
            self._parts[rank] = partial
            if self._barrier.wait() == 0:
                self.made += 1
            total: Tensor = sum(self._parts[1:], self._parts[0])
            self._barrier.wait()
            return total

        return add


class Divided:
    """A tiny model in two workers, with edits."""

    def __init__(self, *bundles: Bundle) -> None:
        self.sums = Sums()
        workers = [Rank(rank, WORKERS) for rank in range(WORKERS)]
        self.models = [divided(TinyModel(), worker, self.sums.of(worker.rank)) for worker in workers]
        reservation = reservation_of(*bundles)
        self.edited = [
            edited_model(model, reservation, slots=2, worker=worker, over_workers=self.sums.of(worker.rank))
            for model, worker in zip(self.models, workers, strict=True)
        ]
        for slot, bundle in enumerate(bundles, 1):
            tensors = check(bundle)
            for edited in self.edited:
                edited.install(slot, edited.prepare(bundle.version, bundle.manifest, tensors))

    def run(self, x: Tensor, slots: Sequence[int]) -> list[Tensor]:
        """The logits that every worker computes of a step of one token for each slot."""
        for edited in self.edited:
            set_step(edited, [RequestStep([slot, edited.held[slot], 1.0] if slot else None, 1) for slot in slots])

        def one(model: TinyModel, edited: EditedModel) -> Tensor:
            hidden = model(x)
            edited.note_output(hidden)
            return model.logits(hidden)

        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(one, self.models, self.edited))


@pytest.fixture
def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(TOKENS, WIDTHS.hidden)


@pytest.mark.long
@for_every_form()
def test_every_kind_at_every_site_is_its_formula_on_every_worker(pair: Any, inputs: Tensor) -> None:
    """Two heads, two workers, one key-value head that both have; base tokens beside edited ones keep their bits."""
    bundle = bundle_of([pair])
    workers, plain = Divided(bundle), Divided().run(inputs, [0] * TOKENS)
    served = workers.run(inputs, [1, 0] * (TOKENS // 2))
    expected = by_formula(TinyModel(), inputs, bundle)
    for mine, base in zip(served, plain, strict=True):
        np.testing.assert_allclose(mine[::2], expected[::2], rtol=1e-4, atol=1e-4)
        assert torch.equal(mine[1::2], base[1::2])
        assert (mine[::2] - base[::2]).abs().max() > 1e-3, "positive control"


def test_versions_of_every_kind_at_every_layer_are_their_formulas(inputs: Tensor) -> None:
    bundles = [crowded(1), crowded(2)]
    formula = [by_formula(TinyModel(), inputs, bundle) for bundle in (None, *bundles)]
    slots = [token % 3 for token in range(TOKENS)]
    for served in Divided(*bundles).run(inputs, slots):
        for token, slot in enumerate(slots):
            np.testing.assert_allclose(served[token], formula[slot][token], rtol=1e-4, atol=1e-4)


REDIRECTION = LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=2)


@pytest.mark.parametrize(
    ("edits", "more"),
    [
        pytest.param([REDIRECTION], 0, id="a redirection joins the sum of its module"),
        pytest.param([LowRank(site="layers.0.attn.out", reads="layers.0.attn.z", rank=1)], 0, id="so after attention"),
        pytest.param([REDIRECTION, Offset(site="layers.1.mlp.out")], 0, id="an offset may stand behind it"),
        pytest.param(
            [REDIRECTION, Gate(site="layers.1.mlp.out", reads="layers.1.mlp.in", rank=1)], 0,
            id="a gate may read the module's input beside it",
        ),
        pytest.param([REDIRECTION, Scale(site="layers.1.mlp.out", per="channel")], 1, id="a scale comes before it"),
        pytest.param(
            [REDIRECTION, LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.out", rank=1, part=2)], 1,
            id="an edit in place must not read it",
        ),
        pytest.param([LowRank(site="layers.0.up.out", reads="layers.0.mlp.in", rank=2)], 0, id="all have the input"),
        pytest.param([SubspaceFilter(site="layers.0.resid", rank=2)], 0, id="all have the residual stream"),
        pytest.param([Scale(site="layers.0.attn.z"), Offset(site="layers.0.v.out")], 0, id="number by number"),
        pytest.param([SubspaceFilter(site="layers.0.attn.z", rank=2)], 1, id="a dot product over all heads"),
        pytest.param([Gate(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=3)], 1, id="a gate needs it whole"),
        pytest.param([Offset(site="layers.0.mlp.h", renorm=True)], 2, id="a norm before and after"),
    ],
)  # fmt: skip
def test_what_an_edit_costs_in_sums_over_workers(edits: list[Any], more: int, inputs: Tensor) -> None:
    """And it is its formula, whichever way that is computed."""
    bundle = bundle_of([(edit, random_numbers(edit, BASE, number)) for number, edit in enumerate(edits)])
    workers = Divided(bundle)
    served = workers.run(inputs, [1] * TOKENS)[0]
    assert workers.sums.made == PER_LAYER * WIDTHS.layers + more
    np.testing.assert_allclose(served, by_formula(TinyModel(), inputs, bundle), rtol=1e-4, atol=1e-4)


def test_every_place_that_can_be_edited_is_reached_once_on_every_worker(inputs: Tensor) -> None:
    """A site whose edits join the sum over workers has two places: before that sum and behind it."""
    edit = LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=1)
    model = Divided(bundle_of([(edit, random_numbers(edit, BASE, 1))]))
    with ExitStack() as watching:
        reached = [watching.enter_context(edited.watched()) for edited in model.edited]
        model.run(inputs[:2], [0, 0])
    for each in reached:
        assert set(each.values()) == {1}
        assert {"layers.1.mlp.out", "layers.1.mlp.out before the sum over workers"} <= each.keys()


def test_workers_hold_different_numbers_of_one_version_and_count_the_same_firings(inputs: Tensor) -> None:
    gate = Gate(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=3)
    bundle = bundle_of([(gate, random_numbers(gate, BASE, 1))])
    workers = Divided(bundle)
    assert len({edited.digest(1) for edited in workers.edited}) == WORKERS
    workers.run(inputs, [1] * TOKENS)
    first, second = (edited.firings(1) for edited in workers.edited)
    ((_, tokens, firings),) = first
    assert first == second
    assert tokens == TOKENS
    assert firings[gate.label] > 0


def test_the_bytes_of_a_capacity_are_those_of_each_worker() -> None:
    bundle = crowded(1)
    reservation = reservation_of(bundle)
    workers, whole = Divided(bundle), edited_model(TinyModel(), reservation, slots=2)
    each = {edited.bytes_reserved for edited in workers.edited}
    capacity_bytes = slot_bytes(WIDTHS, torch.float32, WORKERS)
    assert each == {3 * sum(capacity_bytes(group, capacity) for group, capacity in reservation.capacities.items())}
    assert each.pop() < whole.bytes_reserved


@pytest.mark.parametrize(
    ("worker", "point", "shard"),
    [
        (Rank(1, 2), "q.out", Shard(4, 4, 8)),
        (Rank(1, 2), "mlp.h", Shard(8, 8, 16)),
        (Rank(1, 2), "k.out", Shard(0, 4, 4, counts=False)),
        (Rank(0, 2), "v.out", Shard(0, 4, 4)),
        (Rank(1, 2), "resid", Shard(0, 8, 8, counts=False)),
        (Rank(), "q.out", Shard.all_of(8)),
    ],
)
def test_what_a_worker_has_of_a_vector(worker: Rank, point: str, shard: Shard) -> None:
    assert worker.shard(WIDTHS, point) == shard


def test_of_several_workers_with_the_same_head_one_speaks() -> None:
    """Four workers, two key-value heads: the sum over all workers counts every number once."""
    widths = WIDTHS.model_copy(update={"heads": 4, "kv_heads": 2})
    shares = [Rank(rank, 4).shard(widths, "k.out") for rank in range(4)]
    assert [(shard.start, shard.width, shard.counts) for shard in shares] == [
        (0, 4, True), (0, 4, False), (4, 4, True), (4, 4, False)]  # fmt: skip
    vector = torch.arange(8.0)
    parts: list[Tensor] = []
    for shard in shares:
        shard.sum(lambda part: (parts.append(part), part)[1])(shard.of(vector).sum())
    assert sum(parts) == vector.sum()


def in_weights(edit: Any) -> bool:
    """Whether an edit has a weight form here, where only what attention and MLP give has a bias."""
    architecture = ARCHITECTURES[BASE.architecture]
    biased = all(site.point in ("attn.out", "mlp.out") for site in touched(edit, architecture))
    return not formless([edit], architecture) and (biased or not edit.adds_constant)


@for_every_form(in_weights)
def test_every_worker_puts_its_own_of_the_same_weights_into_place(pair: Any) -> None:
    """Bit for bit what is cut from the weights of a model that nobody divides; and as many fingerprints as workers."""
    bundle, whole = bundle_of([pair]), TinyModel()
    tensors, original = check(bundle), copy.deepcopy(whole)
    undivided = plain_weights(whole)
    undivided.install(undivided.prepare(bundle.version, bundle.manifest, tensors), 1)

    def projection(site: Site) -> tuple[Tensor, None]:
        at = site_modules(original, BASE.architecture, WIDTHS)[site]
        return at.module.weight[at.start or 0 :][: at.shard.width], None

    for worker in (Rank(rank, WORKERS) for rank in range(WORKERS)):
        mine = divided(original, worker, identity)
        weights = plain_weights(mine, worker, projection)
        before = [each.clone() for each in mine.parameters()]
        weights.install(weights.prepare(bundle.version, bundle.manifest, tensors), 1)
        expected = divided(whole, worker, identity)
        for (name, found), cut in zip(mine.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(found, cut), name
        assert not all(map(torch.equal, mine.parameters(), before)), "positive control"
        weights.install(None, 2)
        assert all(map(torch.equal, mine.parameters(), before))


def test_a_part_of_another_weight_than_the_files_hold_is_refused() -> None:
    edit = Scale(site="layers.1.attn.z")
    bundle = bundle_of([(edit, random_numbers(edit, BASE, 0))])
    mine = divided(TinyModel(), Rank(1, WORKERS), identity)
    weights = plain_weights(mine, Rank(1, WORKERS), lambda site: (torch.zeros(WIDTHS.of(site.point), 8), None))
    with pytest.raises(UnsupportedHost, match=r"hold another projection to layers.1.attn.out than the one"):
        weights.prepare(bundle.version, bundle.manifest, check(bundle))


def cut_otherwise(model: TinyModel) -> None:
    model.model.layers[1].mlp.down_proj.input_size_per_partition = WIDTHS.mlp


def summed_later(model: TinyModel) -> None:
    model.model.layers[1].mlp.down_proj.reduce_results = False


@pytest.mark.parametrize(
    ("change", "why"),
    [(cut_otherwise, "expected 8 numbers in each worker, found 16"), (summed_later, "found a part of a sum")],
)
def test_a_model_that_is_divided_otherwise_is_refused(change: Callable[[TinyModel], None], why: str) -> None:
    model = divided(TinyModel(), Rank(0, WORKERS), identity)
    site_modules(model, BASE.architecture, WIDTHS, Rank(0, WORKERS))
    change(model)
    with pytest.raises(UnsupportedHost, match=why):
        site_modules(model, BASE.architecture, WIDTHS, Rank(0, WORKERS))
