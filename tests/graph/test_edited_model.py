"""A model with edits in its slots: what it computes, what a slot holds, and which slot each token reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.proofs.parity import random_numbers
from tests.support.bundles import Pairs, random_bundle, random_pairs
from tests.support.edited_models import (
    SLOTS,
    TOKENS,
    bundle_of,
    by_formula,
    claim_on,
    crowded,
    install,
    reservation_of,
    run,
)
from tests.support.every_form import PAIRS, for_every_form
from tests.support.fakes import (
    BASE,
    MAX_TOKENS,
    WIDTHS,
    Projection,
    RequestStep,
    TinyLayer,
    TinyModel,
    edited_model,
    edits_by_formula,
    set_step,
    tiny_by_formula,
)
from vllm_edits.edit_store import (
    Bundle,
    Gate,
    LowRank,
    Offset,
    Provenance,
    Scale,
    Scope,
    Site,
    Strength,
    SubspaceFilter,
)
from vllm_edits.edit_store.architectures import ARCHITECTURES
from vllm_edits.edit_store.edits import Array
from vllm_edits.edit_store.errors import InstallRefused, UnsupportedHost
from vllm_edits.edit_store.kinds.gate import SILENT
from vllm_edits.plugin.claim import FalseClaim
from vllm_edits.plugin.graph.carried import Carried
from vllm_edits.plugin.graph.cpu_products import compiled
from vllm_edits.plugin.graph.device_rows import DeviceRows
from vllm_edits.plugin.graph.edited_model import EditedModel
from vllm_edits.plugin.graph.finite import finite
from vllm_edits.plugin.graph.reservation import Capacity, EditGroup, Reservation
from vllm_edits.plugin.graph.slot_products import EXPRESSIONS, SlotProducts
from vllm_edits.plugin.graph.tensor_parallel import Shard
from vllm_edits.plugin.vllm_host.architectures import site_modules

PRODUCTS = [pytest.param(EXPRESSIONS, id="expressions"), pytest.param(compiled(), id="compiled")]


EVERYWHERE = reservation_of(*(bundle_of([pair]) for pair in PAIRS))
"""Capacity for every edit."""


def with_larger_capacity(reservation: Reservation) -> Reservation:
    """The same places with a rank more and all that edits of their kind may be."""
    features = {"gate": {"normalise"}, "subspace_filter": {"dual", "onto"}, "offset": {"renorm"}}
    capacities = {
        group: capacity | Capacity(capacity.rank + 1, frozenset(features.get(group.kind, ())))
        for group, capacity in reservation.capacities.items()
    }
    return replace(reservation, capacities=capacities)


def use_slots(edited: EditedModel, slots: list[int]) -> None:
    """One request of one token for each slot."""
    set_step(edited, [RequestStep(claim_on(edited, slot), 1) for slot in slots])


@pytest.fixture
def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(TOKENS, WIDTHS.hidden)


@pytest.mark.parametrize(
    ("more", "products"),
    [
        pytest.param(False, EXPRESSIONS, id="capacity as needed"),
        pytest.param(True, EXPRESSIONS, id="larger capacity"),
        pytest.param(True, compiled(), id="larger capacity, compiled"),
    ],
)
@for_every_form()
def test_every_kind_at_every_site_is_its_formula_for_its_own_tokens(
    pair: Any, products: SlotProducts, more: bool, inputs: Tensor
) -> None:
    """Edited tokens differ from the base and are the formula's; base tokens beside them keep their bits."""
    bundle, model, plain = bundle_of([pair]), TinyModel(), TinyModel()
    reservation = reservation_of(bundle)
    edited = edited_model(
        model, with_larger_capacity(reservation) if more else reservation, slots=SLOTS, products=products
    )
    install(edited, 2, bundle)
    use_slots(edited, [2, 0] * (TOKENS // 2))
    served, base = run(model, edited, inputs), plain.logits(plain(inputs))
    assert torch.equal(served[1::2], base[1::2])
    np.testing.assert_allclose(served[::2], by_formula(plain, inputs, bundle)[::2], rtol=1e-4, atol=1e-4)
    assert (served[::2] - base[::2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "edit",
    [LowRank(site="layers.0.resid", reads="layers.0.resid", rank=2), SubspaceFilter(site="layers.0.resid", rank=2)],
)
def test_the_first_layer_is_edited_before_it_and_behind_it(edit: Any, inputs: Tensor) -> None:
    """One module for both: what enters it is a vector, and what leaves it is two halves of one."""
    edits: list[Any] = [Offset(site="embed.out"), edit]
    bundle, model, plain = (
        bundle_of([(each, random_numbers(each, BASE, 1)) for each in edits]),
        TinyModel(),
        TinyModel(),
    )
    edited = edited_model(model, reservation_of(bundle), slots=SLOTS)
    install(edited, 2, bundle)
    use_slots(edited, [2] * TOKENS)
    np.testing.assert_allclose(run(model, edited, inputs), by_formula(plain, inputs, bundle), rtol=1e-4, atol=1e-4)


@for_every_form(lambda edit: edit.kind != "subspace_filter")
def test_an_edit_that_asks_for_nothing_is_the_identity_bit_for_bit(pair: Any, inputs: Tensor) -> None:
    """Factors of one, vectors and writes of zero. (A projection always asks for something.)"""
    edit, numbers = pair
    idle = {"scale": {"factor": 1.0}, "offset": {"vector": 0.0}}.get(edit.kind, {"write": 0.0})
    numbers = {**numbers, **{name: np.full_like(numbers[name], value) for name, value in idle.items()}}
    bundle, model, plain = bundle_of([(edit, numbers)]), TinyModel(), TinyModel()
    edited = edited_model(model, reservation_of(bundle), slots=SLOTS)
    install(edited, 2, bundle)
    use_slots(edited, [2] * TOKENS)
    assert torch.equal(run(model, edited, inputs), plain.logits(plain(inputs)))


@pytest.mark.parametrize("activation", SILENT)
@pytest.mark.parametrize("normalise", [False, True])
def test_a_gate_off_its_trigger_is_exactly_the_base(activation: Any, normalise: bool, inputs: Tensor) -> None:
    """Token by token: where the formula's neuron is silent nothing changes, elsewhere something does."""
    edit = Gate(site="layers.1.mlp.out", reads="layers.1.mlp.in", rank=1, activation=activation, normalise=normalise)
    numbers = random_numbers(edit, BASE, seed=4)
    numbers["bias"] = np.full(1, -0.1, dtype=np.float32)
    if normalise:
        numbers["read"] /= np.linalg.norm(numbers["read"])
    seen: dict[str, Array] = {}

    def look(site: str, value: Array) -> Array:
        seen[site] = value
        return value

    tiny_by_formula(TinyModel(), inputs, look)
    x = seen["layers.1.mlp.in"]
    fired = np.abs(edit.apply(x, np.zeros_like(x), **numbers)).max(-1) > 0
    bundle, model, plain = bundle_of([(edit, numbers)]), TinyModel(), TinyModel()
    edited = edited_model(model, reservation_of(bundle), slots=SLOTS)
    install(edited, 1, bundle)
    use_slots(edited, [1] * TOKENS)
    served, base = run(model, edited, inputs), plain.logits(plain(inputs))
    assert 0 < fired.sum() < TOKENS, "positive control: some fire, some do not"
    assert torch.equal(served[~fired], base[~fired])
    assert not torch.isclose(served[fired], base[fired]).all(-1).any()


def test_the_firings_of_every_gate_are_counted_for_the_tokens_of_its_version(inputs: Tensor) -> None:
    """At several sites, the logits too, and in every slot its own; the gates write nothing, so all see the base."""
    seen: dict[str, Array] = {}

    def look(site: str, value: Array) -> Array:
        seen[site] = value
        return value

    tiny_by_formula(TinyModel(), inputs, look)
    sites = {"layers.0.mlp.out": 2, "layers.0.attn.in": 1, "layers.2.resid": 3, "logits": 1}

    def gates(seed: int, names: list[str]) -> list[Any]:
        pairs = []
        for name in names:
            edit = Gate(site=name, reads="final" if name == "logits" else name, rank=sites[name])
            numbers = random_numbers(edit, BASE, seed)
            pairs.append((edit, {**numbers, "write": np.zeros_like(numbers["write"]), "bias": numbers["bias"] - 0.3}))
        return pairs

    versions = {1: gates(1, list(sites)), 2: gates(2, ["layers.2.resid"]), 3: gates(3, ["logits", "layers.0.mlp.out"])}
    bundles = {slot: bundle_of(pairs, str(slot)) for slot, pairs in versions.items()}
    model = TinyModel()
    edited = edited_model(model, reservation_of(*bundles.values()), slots=SLOTS)
    for slot, bundle in bundles.items():
        install(edited, slot, bundle)
    slots = [number % 4 for number in range(TOKENS)]
    for _ in range(2):
        use_slots(edited, slots)
        run(model, edited, inputs)
    for slot, pairs in versions.items():
        mine = np.array(slots) == slot
        expected = {
            edit.label: 2 * int((seen[edit.source][mine] @ numbers["read"].T + numbers["bias"] > 0).sum())
            for edit, numbers in pairs
        }
        assert edited.firings(slot) == [(bundles[slot].version, 2 * mine.sum(), expected)]
        assert sum(expected.values()) > 0, "positive control"
    assert edited.firings() == [told for slot in versions for told in edited.firings(slot)]
    edited.clear(1)
    assert edited.firings(1) == []
    install(edited, 1, bundles[1])
    ((_, tokens, firings),) = edited.firings(1)
    assert {tokens, *firings.values()} == {0}


@pytest.mark.parametrize("products", PRODUCTS)
def test_every_token_is_computed_by_its_own_versions_formulas(products: SlotProducts, inputs: Tensor) -> None:
    """A batch of the base and three versions, each with every kind at every layer; all differ from the base."""
    bundles: dict[int, Bundle | None] = {0: None, **{slot: crowded(slot) for slot in (1, 2, 3)}}
    model = TinyModel()
    formula = {slot: by_formula(model, inputs, bundle) for slot, bundle in bundles.items()}
    reservation = reservation_of(*filter(None, bundles.values()))
    edited = edited_model(model, reservation, slots=SLOTS, products=products)
    for slot, bundle in bundles.items():
        if bundle is not None:
            install(edited, slot, bundle)
    slots = [token % 4 for token in range(TOKENS)]
    use_slots(edited, slots)
    served = run(model, edited, inputs).numpy()
    for token, slot in enumerate(slots):
        np.testing.assert_allclose(served[token], formula[slot][token], rtol=1e-4, atol=1e-4)
        assert slot == 0 or np.abs(served[token] - formula[0][token]).max() > 0.1


def test_at_one_site_the_filter_comes_before_the_offset(inputs: Tensor) -> None:
    """The offset survives in the filtered directions; the other way round it would be removed (negative control)."""
    basis, vector = np.eye(8, dtype=np.float32)[:1], np.full(8, 1.0, dtype=np.float32)
    mean = np.zeros(8, dtype=np.float32)
    off = SubspaceFilter(site="layers.2.resid", rank=1)
    pairs: Pairs = [(Offset(site="layers.2.resid"), {"vector": vector}), (off, {"basis": basis, "mean": mean})]
    model, bundle = TinyModel(), bundle_of(pairs)
    edited = edited_model(model, reservation_of(bundle), slots=1)
    install(edited, 1, bundle)
    use_slots(edited, [1] * TOKENS)
    hidden = model(inputs)
    served = hidden.atanh()  # the residual stream, which is all that the tiny model's norm bends
    torch.testing.assert_close(served[:, 0], torch.full((TOKENS,), 1.0), rtol=0, atol=1e-5)
    assert not np.allclose(off.apply(served.numpy(), basis=basis, mean=mean), served.numpy(), atol=0.5)


def test_base_tokens_are_bit_identical_to_the_model_without_edits(inputs: Tensor) -> None:
    """In any company: alone, and with batch mates that are edited at every site."""
    plain, model, bundle = TinyModel(), TinyModel(), crowded(1)
    expected = plain(inputs)
    edited = edited_model(model, reservation_of(bundle), slots=SLOTS)
    assert torch.equal(model(inputs), expected)
    install(edited, 2, bundle)
    assert torch.equal(model(inputs), expected)
    slots = torch.tensor([0, 2, 0, 2] * 3)
    use_slots(edited, slots.tolist())
    served = model(inputs)
    assert torch.equal(served[slots == 0], expected[slots == 0])
    assert not torch.isclose(served[slots == 2], expected[slots == 2]).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clearing_a_slot_restores_the_identity_bit_for_bit(dtype: torch.dtype) -> None:
    """Every buffer is again what it was before the install; while installed it was not (positive control)."""
    model, bundle = TinyModel().to(dtype), crowded(1)
    edited = edited_model(model, reservation_of(bundle), slots=SLOTS, dtype=dtype)
    x = torch.randn(4, WIDTHS.hidden, dtype=dtype)
    slots, before, never_used = torch.full((4,), 2), model(x), edited.digest(2)
    install(edited, 2, bundle)
    edited.step.slots[:4] = slots
    assert not torch.equal(model(x), before)
    edited.clear(2)
    assert torch.equal(model(x), before)
    assert edited.digest(2) == never_used
    assert edited.held == {}


def test_bfloat16_slots_hold_the_rounded_numbers(inputs: Tensor) -> None:
    """Bundles are float32 and cast at install: the served edit is the formula's within bfloat16 rounding."""
    model, plain, bundle = TinyModel(), TinyModel(), random_bundle("polite", BASE, seed=3)
    expected = torch.from_numpy(by_formula(plain, inputs, bundle))
    edited = edited_model(model.to(torch.bfloat16), reservation_of(bundle), slots=1, dtype=torch.bfloat16)
    install(edited, 1, bundle)
    use_slots(edited, [1] * TOKENS)
    served = run(model, edited, inputs.bfloat16()).float()
    rounded = plain.to(torch.bfloat16)
    unedited = torch.from_numpy(by_formula(TinyModel(), inputs, None))
    noise = (rounded.logits(rounded(inputs.bfloat16())).float() - unedited).abs().max()
    assert (served - expected).abs().max() < 3 * noise


# -- scope and strength ------------------------------------------------------------------------------------------------

SCOPES = [
    pytest.param(Scope(segment="prompt"), [1, 1, 1, 1, 1, 0, 0, 0], id="prompt"),
    pytest.param(Scope(segment="generated"), [0, 0, 0, 0, 0, 1, 1, 1], id="generated"),
    pytest.param(Scope(first=2), [1, 1, 0, 0, 0, 0, 0, 0], id="first"),
    pytest.param(Scope(last=2), [0, 0, 0, 1, 1, 0, 0, 0], id="last"),
    pytest.param(Scope(first=1, last=1), [1, 0, 0, 0, 1, 0, 0, 0], id="first-or-last"),
    pytest.param(Scope(last=9), [1, 1, 1, 1, 1, 0, 0, 0], id="last-of-a-shorter-prompt"),
    pytest.param(Scope(tokens=(3, 6)), [0, 0, 0, 1, 0, 0, 1, 0], id="tokens"),
    pytest.param(Scope(segment="generated", tokens=(3, 6)), [0, 0, 0, 0, 0, 0, 1, 0], id="generated-tokens"),
]
PROMPT, LENGTH = 5, 8


@pytest.mark.parametrize(("scope", "meant"), SCOPES)
@pytest.mark.parametrize("cuts", [(), (3,), (5,), (2, 6), (1, 2, 3, 4, 5, 6, 7)])
def test_an_edit_applies_in_its_scope_however_the_request_is_cut(
    scope: Scope, meant: list[int], cuts: tuple[int, ...], inputs: Tensor
) -> None:
    """In one step or many, as chunks or after a preemption: a token's absolute position decides. Token ids: 0 to 7."""
    edit = Offset(site="layers.1.resid", scope=scope)
    bundle = bundle_of([(edit, random_numbers(edit, BASE, 1))])
    model, plain = TinyModel(), TinyModel()
    edited = edited_model(model, reservation_of(bundle), slots=SLOTS)
    install(edited, 2, bundle)
    ends, ids = [*cuts, LENGTH], torch.arange(LENGTH)
    changed: list[int] = []
    for begin, end in zip([0, *ends], ends, strict=False):
        beside = RequestStep(None, 2)  # somebody else's request in the same step
        mine = RequestStep(claim_on(edited, 2), end - begin, begin, PROMPT)
        set_step(edited, [beside, mine], torch.cat([torch.tensor([3, 6]), ids[begin:end]]))
        tokens = torch.cat([torch.tensor([8, 9]), ids[begin:end]])
        differs = (run(model, edited, inputs[tokens]) != plain.logits(plain(inputs[tokens]))).any(-1).tolist()
        assert differs[:2] == [False, False]
        changed += differs[2:]
    assert changed == meant


def test_edits_of_one_version_have_scopes_of_their_own(inputs: Tensor) -> None:
    """Prompt, answer and everything, at one site and at several; tokens of other versions follow their own."""
    edits = [Offset(site="layers.1.resid", scope=Scope(segment="prompt")),
             Offset(site="layers.1.resid", scope=Scope(segment="generated"), part=2),
             Scale(site="layers.0.attn.z")]  # fmt: skip
    numbers = [(edit, random_numbers(edit, BASE, seed)) for seed, edit in enumerate(edits)]
    bundle, plain = bundle_of(numbers), TinyModel()
    model = TinyModel()
    edited = edited_model(model, reservation_of(bundle), slots=SLOTS)
    install(edited, 1, bundle)
    set_step(edited, [RequestStep(claim_on(edited, 1), LENGTH, 0, PROMPT)])
    served = run(model, edited, inputs[:LENGTH]).numpy()
    in_prompt, generated = (
        tiny_by_formula(plain, inputs[:LENGTH], edits_by_formula([numbers[kept], numbers[2]])) for kept in (0, 1)
    )
    np.testing.assert_allclose(served[:PROMPT], in_prompt[:PROMPT], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(served[PROMPT:], generated[PROMPT:], rtol=1e-4, atol=1e-4)


def test_factors_of_several_scopes_multiply_where_both_count(inputs: Tensor) -> None:
    """In the prompt both of two scales, behind it the one that is for every token."""
    edits = [Scale(site="layers.1.attn.z"), Scale(site="layers.1.attn.z", scope=Scope(segment="prompt"), part=2)]
    numbers = [(edit, random_numbers(edit, BASE, seed)) for seed, edit in enumerate(edits)]
    bundle, model, plain = bundle_of(numbers), TinyModel(), TinyModel()
    edited = edited_model(model, reservation_of(bundle), slots=SLOTS)
    install(edited, 1, bundle)
    set_step(edited, [RequestStep(claim_on(edited, 1), LENGTH, 0, PROMPT)])
    served = run(model, edited, inputs[:LENGTH]).numpy()
    both, one = (tiny_by_formula(plain, inputs[:LENGTH], edits_by_formula(numbers[:count])) for count in (2, 1))
    np.testing.assert_allclose(served[:PROMPT], both[:PROMPT], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(served[PROMPT:], one[PROMPT:], rtol=1e-4, atol=1e-4)


def test_the_norm_is_restored_once_after_all_offsets_that_count(inputs: Tensor) -> None:
    """Offsets of three scopes meet, one asks for the norm: it is kept where that one counts, with all others in it."""
    edits = [Offset(site="layers.1.resid", scope=Scope(segment="prompt"), renorm=True),
             Offset(site="layers.1.resid", part=2),
             Offset(site="layers.1.resid", scope=Scope(segment="generated"), part=3)]  # fmt: skip
    numbers = [(edit, random_numbers(edit, BASE, seed)) for seed, edit in enumerate(edits)]
    kept, always, generated = (fields["vector"] for _, fields in numbers)
    bundle, model, plain = bundle_of(numbers), TinyModel(), TinyModel()
    edited = edited_model(model, reservation_of(bundle), slots=SLOTS)
    install(edited, 1, bundle)
    set_step(edited, [RequestStep(claim_on(edited, 1), LENGTH, 0, PROMPT)])

    def by_hand(site: str, value: Array) -> Array:
        if site != "layers.1.resid":
            return value
        inside = value + kept + always
        inside *= np.linalg.norm(value, axis=-1, keepdims=True) / np.linalg.norm(inside, axis=-1, keepdims=True)
        return np.where(np.arange(LENGTH)[:, None] < PROMPT, inside, value + always + generated)

    expected = tiny_by_formula(plain, inputs[:LENGTH], by_hand)
    np.testing.assert_allclose(run(model, edited, inputs[:LENGTH]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("products", PRODUCTS)
def test_the_compiler_traces_every_kind_and_scope_in_one_graph(products: SlotProducts, inputs: Tensor) -> None:
    """vLLM compiles the model in one graph: whatever torch cannot trace would end a server's start."""
    pairs, parts = [], Counter[tuple[str, str]]()
    for scope in (Scope(), Scope(segment="prompt")):
        for edit, numbers in PAIRS:
            parts[edit.site, edit.kind] += 1
            pairs.append((edit.model_copy(update={"scope": scope, "part": parts[edit.site, edit.kind]}), numbers))
    bundle, model = bundle_of(pairs), TinyModel()
    edited = edited_model(model, reservation_of(bundle), slots=SLOTS, products=products)
    install(edited, 1, bundle)
    set_step(edited, [RequestStep(claim_on(edited, 1), TOKENS, 0, TOKENS // 2)])
    calls = Counter[str]()

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    traced: Any = torch.compile(model, backend=look, fullgraph=True)
    with names_in_bytecode() as names:
        assert torch.equal(traced(inputs), model(inputs))
    assert calls["index_add_"] == 1, "all gates are counted in one operation"
    assert (calls["vllm_edits.slot_dots.default"] > 0) == (products is not EXPRESSIONS)
    assert "update" not in names, "with CUDA graphs vLLM refuses a forward that writes to a dictionary"
    assert set(carried_by(model)) == {None}, "a tensor that is left behind is an output more of the graph"


def carried_by(model: nn.Module) -> Iterator[Any]:
    """What modules carry to each other, or carried in a forward pass that has ended."""
    for module in model.modules():
        for held in vars(module).values():
            if isinstance(held, Carried):
                yield from vars(held).values()


@contextmanager
def names_in_bytecode() -> Iterator[set[str]]:
    """What is named by the code that the compiler makes of what is called inside. vLLM looks there too."""
    names = set[str]()
    hook = torch._dynamo.convert_frame.register_bytecode_hook(lambda _, code: names.update(code.co_names))
    try:
        yield names
    finally:
        hook.remove()


def test_a_forward_that_writes_to_a_dictionary_is_seen_in_its_code(inputs: Tensor) -> None:
    """Positive control of the above: what vLLM would refuse is found where it is looked for."""
    kept: dict[str, Tensor] = {}

    def forward(x: Tensor) -> Tensor:
        kept["twice"] = x * 2
        return kept.pop("twice") + 1

    traced: Any = torch.compile(forward, backend="eager", fullgraph=True)
    with names_in_bytecode() as names:
        traced(inputs)
    assert "update" in names


@for_every_form()
def test_strength_interpolates(pair: Any, inputs: Tensor) -> None:
    """What the edit adds at its site is multiplied; strength 0 is the base bit for bit; each request has its own."""
    bundle = Bundle.create("polite", BASE, [pair], Provenance(tool="tests", method="random"),
                           strength=Strength(minimum=-2, maximum=2))  # fmt: skip
    site = pair[0].site
    model, plain = TinyModel(), TinyModel()
    edited = edited_model(model, reservation_of(bundle), slots=SLOTS)
    install(edited, 1, bundle)
    thirds = {0.0: slice(0, 4), 0.5: slice(4, 8), 1.0: slice(8, 12)}
    set_step(edited, [RequestStep(claim_on(edited, 1, strength), 4) for strength in thirds])
    served = run(model, edited, inputs)
    whole = edits_by_formula([pair])

    def half(name: str, value: Array) -> Array:
        changed = whole(name, value)
        return value + (changed - value) / 2 if name == site else changed

    if isinstance(pair[0], Offset) and pair[0].renorm:  # the vector is halved, and the norm then kept
        halved = {"vector": pair[1]["vector"] / 2}
        half = edits_by_formula([(pair[0], halved)])  # type: ignore[assignment]
    assert torch.equal(served[:4], plain.logits(plain(inputs))[:4])
    np.testing.assert_allclose(served[4:8], tiny_by_formula(plain, inputs, half)[4:8], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(served[8:], by_formula(plain, inputs, bundle)[8:], rtol=1e-4, atol=1e-4)
    use_slots(edited, [1] * TOKENS)
    np.testing.assert_allclose(run(model, edited, inputs), by_formula(plain, inputs, bundle), rtol=1e-4, atol=1e-4)


# -- slots -------------------------------------------------------------------------------------------------------------


def test_equal_contents_have_equal_digests_and_different_ones_different() -> None:
    """Two workers that hold the same agree; another version, another number or another slot's past do not matter."""
    first, second = crowded(1), crowded(2)
    workers = [edited_model(TinyModel(seed), reservation_of(first, second), slots=SLOTS) for seed in (0, 1)]
    install(workers[1], 1, second)
    workers[1].clear(1)
    assert install(workers[0], 1, first) == install(workers[1], 1, first) == install(workers[0], 3, first)
    assert install(workers[0], 2, second) != workers[0].digest(1)


def test_the_digest_sees_every_number_of_every_place() -> None:
    """A worker whose memory differs in one number of any slot tensor is found out; what was counted is not in it."""
    bundle = crowded(1)
    edited = edited_model(TinyModel(), reservation_of(bundle), slots=SLOTS)
    digests = {install(edited, 1, bundle)}
    held = [group.tensor(name) for group in edited._slot_tensors.values() for name in group.columns]
    assert {tensor.dtype for tensor in held} == {torch.float32}, "each type would be an input more of the graph"
    for tensor in held:
        last = tensor[1].view(-1)[-1]
        last += 1
        seen = len(digests)
        digests.add(edited.digest(1))
        assert len(digests) == seen + 1
    edited._firings[0].counts[1] += 1
    assert edited.digest(1) in digests


def test_a_version_of_smaller_rank_leaves_the_rest_of_its_row_zero(inputs: Tensor) -> None:
    """After a version of full rank has left, nothing of it is felt by one of rank 1 in the same slot."""

    def redirection(rank: int, seed: int) -> Bundle:
        numbers = np.random.default_rng(seed)
        edit = LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=rank)
        return bundle_of([(edit, {name: numbers.normal(size=shape) for name, shape in edit.shapes(WIDTHS).items()})])

    large, small = redirection(4, seed=1), redirection(1, seed=2)
    model, fresh = TinyModel(), TinyModel()
    for edited, bundles in ((edited_model(model, reservation_of(large), slots=1), [large, small]),
                            (edited_model(fresh, reservation_of(large), slots=1), [small])):  # fmt: skip
        for bundle in bundles:
            edited.clear(1)
            install(edited, 1, bundle)
        use_slots(edited, [1] * TOKENS)
    assert torch.equal(model(inputs), fresh(inputs))


@pytest.mark.parametrize("slot", [0, 1, -1, SLOTS + 1])
def test_only_a_free_slot_can_be_installed_into(slot: int) -> None:
    """Slot 0 is the base model's, slot 1 is used, the others do not exist; slot 2 is free (positive control)."""
    bundle = random_bundle("polite", BASE, seed=1)
    edited = edited_model(TinyModel(), reservation_of(bundle), slots=SLOTS)
    held = install(edited, 1, bundle)
    with pytest.raises(ValueError, match="not a free slot"):
        install(edited, slot, random_bundle("other", BASE, seed=2))
    assert edited.digest(1) == held
    install(edited, 2, bundle)


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=3), "rank 2 is reserved"),
        (LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=1), "nothing is reserved there"),
        (Offset(site="layers.1.resid"), "nothing is reserved there"),
    ],
)
def test_what_was_not_reserved_is_refused_with_the_setting_to_raise(edit: Any, found: str) -> None:
    pairs = random_pairs("low_rank", 1, WIDTHS, seed=0)
    edited = edited_model(TinyModel(), reservation_of(bundle_of(pairs)), slots=1)
    refused = bundle_of([(edit, {name: np.zeros(shape) for name, shape in edit.shapes(WIDTHS).items()})])
    with pytest.raises(InstallRefused, match=found) as refusal:
        install(edited, 1, refused)
    assert [reason.code for reason in refusal.value.reasons] == ["capacity"]
    assert "edits.reserve" in str(refusal.value)
    assert edited.held == {}


# -- the step ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_versions() -> EditedModel:
    bundles = [random_bundle("polite", BASE, seed) for seed in (1, 2)]
    edited = edited_model(TinyModel(), reservation_of(*bundles), slots=SLOTS)
    for slot, bundle in enumerate(bundles, start=1):
        install(edited, slot, bundle)
    return edited


def test_each_token_gets_the_slot_of_its_request(two_versions: EditedModel) -> None:
    """Requests bring many tokens (a prefill), one (a decode) or none."""
    requests = [(2, 3), (0, 2), (1, 0), (2, 1)]
    set_step(two_versions, [RequestStep(claim_on(two_versions, slot), tokens) for slot, tokens in requests])
    assert two_versions.step.slots[:6].tolist() == [2, 2, 2, 0, 0, 2]


def test_the_buffer_keeps_its_address_and_goes_back_to_base(two_versions: EditedModel) -> None:
    """A step of base requests only, after one with edits, reads slot 0 everywhere, also beyond its own tokens."""
    address = two_versions.step.slots.data_ptr()
    for _ in range(2):
        set_step(two_versions, [RequestStep(claim_on(two_versions, 1), MAX_TOKENS)])
        assert two_versions.step.slots.tolist() == [1] * MAX_TOKENS
        set_step(two_versions, [RequestStep(None, 1)] * 2)
        assert two_versions.step.slots.tolist() == [0] * MAX_TOKENS
    assert two_versions.step.slots.data_ptr() == address


def test_steps_of_base_requests_touch_nothing(two_versions: EditedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path: while only the base is asked, nothing is written for the device."""
    written, write = list[int](), DeviceRows.write

    def noted(rows: DeviceRows, values: np.ndarray) -> None:
        written.append(len(values))
        write(rows, values)

    monkeypatch.setattr(DeviceRows, "write", noted)
    for _ in range(3):
        set_step(two_versions, [RequestStep(None, 4)])
    assert not written
    set_step(two_versions, [RequestStep(claim_on(two_versions, 1), 4)])
    assert written, "positive control"


@pytest.mark.parametrize(
    "claim",
    [
        (1, "f" * 64),
        (3, "f" * 64),
        (0, "f" * 64),
        (99, "f" * 64),
    ],
)
def test_a_false_claim_stops_the_step(two_versions: EditedModel, claim: tuple[int, str | None]) -> None:
    """Another version in the slot, an empty slot, the base slot, no such slot: never answered with other edits."""
    before = two_versions.step.slots.clone()
    with pytest.raises(RuntimeError, match="refusing to answer"):
        set_step(two_versions, [RequestStep(None, 1), RequestStep([*claim, 1.0], 1)])
    assert torch.equal(two_versions.step.slots, before)


@pytest.mark.parametrize(
    "claim",
    ["claim", [], [1], [1, None, 1.0], [1, "f" * 64], ["1", "f" * 64, 1.0], [1, "f" * 64, "much"], 7, {}, {"a": 1}],
)
def test_what_is_no_claim_is_a_false_one(two_versions: EditedModel, claim: Any) -> None:
    """Whatever way it got there, it is told as any other, and not with an error of Python's."""
    with pytest.raises(FalseClaim, match=r"expected a claim of \[slot, version, strength\]"):
        two_versions.slot_of(claim)


def test_a_claim_on_a_version_that_left_is_false(two_versions: EditedModel) -> None:
    claim = claim_on(two_versions, 1)
    assert two_versions.slot_of(claim) == 1
    two_versions.clear(1)
    with pytest.raises(RuntimeError, match="which holds nothing"):
        two_versions.slot_of(claim)


def test_a_request_that_stays_in_the_batch_is_looked_at_again_when_its_slot_changes(two_versions: EditedModel) -> None:
    """What is known of a request is kept between steps, but not past a change of what slots hold."""
    requests = [RequestStep(claim_on(two_versions, 1), 2)]
    for _ in range(2):
        set_step(two_versions, requests)
    two_versions.clear(1)
    with pytest.raises(RuntimeError, match="which holds nothing"):
        set_step(two_versions, requests)
    install(two_versions, 1, random_bundle("another", BASE, seed=7))
    with pytest.raises(RuntimeError, match="refusing to answer it with other edits"):
        set_step(two_versions, requests)


# -- proof -------------------------------------------------------------------------------------------------------------


def test_every_place_that_can_be_edited_is_reached_once(inputs: Tensor) -> None:
    """All kinds at all sites, also those that are only read; afterwards nothing is watched any more."""
    model = TinyModel()
    edited = edited_model(model, EVERYWHERE, slots=SLOTS)
    with edited.watched() as reached:
        model.logits(model(inputs))
    assert set(reached.values()) == {1}, reached
    assert {str(site) for site in EVERYWHERE.sites()} <= reached.keys()
    model(inputs)
    assert set(reached.values()) == {1}


def test_a_module_that_the_model_goes_past_is_told(inputs: Tensor) -> None:
    """As fused kernels do with norms: the weight is read, and the module never called. Or it is called twice."""
    model, points = TinyModel(), ("gate.out", "up.out", "mlp.out", "q.out", "attn.out")
    capacities = {
        EditGroup(site, "offset", site): Capacity()
        for site in (Site(layer, point) for layer in (0, 1) for point in points)
    }
    edited = edited_model(model, Reservation(capacities), slots=SLOTS)
    past = model.model.layers[1].mlp

    def fused(x: Tensor) -> Tensor:
        gate, up = (x @ past.gate_up_proj.weight.T).chunk(2, -1)
        output: Tensor = past.down_proj(gate.relu() * up)[0]
        return output

    past.forward = fused
    with edited.watched() as reached:
        model(inputs)
        model.model.layers[0].self_attn(hidden_states=inputs)
    wrong = {site: times for site, times in reached.items() if times != 1}
    assert wrong == {"layers.1.gate.out": 0, "layers.1.up.out": 0, "layers.0.q.out": 2, "layers.0.attn.out": 2}


# -- modules -----------------------------------------------------------------------------------------------------------


def test_an_edited_module_is_still_the_same_object_of_the_same_kind() -> None:
    """Parameter names, state dict, isinstance and identity stay, so weights load and reload as before."""
    model = TinyModel()
    modules, weights = dict(model.named_modules()), dict(model.named_parameters())
    edited = edited_model(model, reservation_of(crowded(1)), slots=SLOTS)
    after = dict(model.named_modules())
    assert all(after[name] is module for name, module in modules.items())
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == {
        name: id(tensor) for name, tensor in weights.items()
    }
    assert set(model.state_dict()) == set(weights)
    layer: Any = model.model.layers[0]
    assert isinstance(layer, TinyLayer)
    assert type(layer) is not TinyLayer
    assert isinstance(layer.mlp.down_proj, Projection)
    assert type(layer.mlp.down_proj).__name__ == "EditedSummingProjection"
    assert type(model.lm_head) is Projection  # no site, no change
    assert all(isinstance(group, nn.Module) for group in edited._slot_tensors.values())


OFFSET = EditGroup(Site(1, "resid"), "offset", Site(1, "resid"))


def test_sites_without_a_reservation_are_left_alone() -> None:
    model = TinyModel()
    edited_model(model, Reservation({OFFSET: Capacity()}), slots=1)
    assert [hasattr(layer, "edits") for layer in model.model.layers] == [False, True, False]


def test_a_module_with_a_forward_of_its_own_is_refused() -> None:
    """Exchanging its class would change nothing, and the base would be served for a variant."""
    model = TinyModel()
    layer: Any = model.model.layers[1]
    layer.forward = layer.forward
    with pytest.raises(UnsupportedHost, match=r"layers\.1\.resid has a forward of its own"):
        edited_model(model, Reservation({OFFSET: Capacity()}), slots=1)


def test_logits_of_unknown_tokens_are_refused(inputs: Tensor) -> None:
    """As many as requests: their last tokens. Part of what the model gave: those tokens. Anything else: not guessed."""
    edit = Offset(site="logits")
    bundle, model = bundle_of([(edit, random_numbers(edit, BASE, 1))]), TinyModel()
    edited = edited_model(model, reservation_of(bundle), slots=1)
    install(edited, 1, bundle)
    set_step(edited, [RequestStep([1, bundle.version, 1.0], 3), RequestStep(None, TOKENS - 3)])
    hidden = model(inputs)
    edited.note_output(hidden)
    plain = hidden @ model.lm_head.weight.T
    for rows, changed in ((torch.tensor([2, TOKENS - 1]), [True, False]), (slice(1, 5), [True, True, False, False])):
        told = (model.logits(hidden[rows]) - plain[rows]).abs().sum(-1) > 0.1
        assert told.tolist() == changed
    with pytest.raises(RuntimeError, match="which tokens those are is unknown"):
        model.logits(hidden[[0, 1, 2]])


def test_the_reserved_bytes_are_those_of_the_slot_tensors() -> None:
    """An offset of 8 float32 in each of 4 slots, the base slot among them; every tensor begins at a cache line."""
    reservation = Reservation({OFFSET: Capacity()})
    assert edited_model(TinyModel(), reservation, slots=3).bytes_reserved == 4 * 64


@pytest.mark.parametrize(
    ("model", "architecture", "reason"),
    [
        (TinyModel(), "MambaForCausalLM", "Supported: LlamaForCausalLM"),
        (nn.Linear(2, 2), "LlamaForCausalLM", "in an unexpected way"),
    ],
)
def test_an_architecture_that_is_not_known_is_refused(model: nn.Module, architecture: str, reason: str) -> None:
    with pytest.raises(UnsupportedHost, match=reason):
        site_modules(model, architecture, WIDTHS)


def test_a_layer_that_is_given_its_vectors_under_another_name_is_refused() -> None:
    """Its first argument may be anything: positions, in most models of vLLM's."""

    class OtherLayer(TinyLayer):
        def forward(self, positions: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(vectors, positions)

    model = TinyModel()
    model.model.layers[0].__class__ = OtherLayer
    with pytest.raises(UnsupportedHost, match=r"embed.out otherwise .* with positions, vectors, and no hidden_states"):
        site_modules(model, BASE.architecture, WIDTHS)


def test_every_site_of_the_model_has_an_anchor_of_the_right_widths() -> None:
    found: Mapping[Site, Any] = site_modules(TinyModel(), BASE.architecture, WIDTHS)
    assert list(found) == ARCHITECTURES[BASE.architecture].sites(WIDTHS.layers)
    assert all(one < other for one, other in pairwise(found))
    assert all(site_module.shard == Shard.all_of(WIDTHS.of(site.point)) for site, site_module in found.items())
    fused = [found[Site(0, point)].start for point in ("q.out", "k.out", "v.out", "gate.out", "up.out")]
    assert fused == [0, 8, 12, 0, 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_cached_is_finite_and_finite_numbers_stay(dtype: torch.dtype) -> None:
    """Bit for bit, the sign of a zero too; what is none becomes huge, so that its own request still overflows."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([0.0, -0.0, 1.5, -3e-5, largest, -largest], dtype=dtype)
    same = finite(x)
    assert torch.equal(same, x)
    assert torch.equal(same.signbit(), x.signbit())
    wild = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    assert finite(wild).tolist() == [largest] * 3
    assert (finite(wild) * 0 == 0).all()
    assert not torch.isfinite(finite(wild)[:1] * 2).any()
