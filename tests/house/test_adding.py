"""A kind of edit is three files, an architecture one, an authoring method one: shown with a kind and an architecture
that the product does not have, registered from outside, and by counting files."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from tests.proofs.parity import every_edit, random_numbers
from tests.support import toy_architecture
from tests.support.bundles import Pairs, bundle_of
from tests.support.edited_models import SLOTS, TOKENS, by_formula, claim_on, install, reservation_of, run
from tests.support.fakes import (
    BASE,
    WIDTHS,
    RequestStep,
    TinyModel,
    edited_model,
    edits_by_formula,
    plain_weights,
    set_step,
    tiny_by_formula,
)
from tests.support.toy_architecture import ToyForCausalLM
from tests.support.toy_kind import formula, graph, store
from tests.support.toy_kind.store import Clamp
from vllm_edits.edit_store import (
    KINDS,
    Bundle,
    LowRank,
    Manifest,
    Offset,
    Scope,
    Strength,
    SubspaceFilter,
    check,
    identify,
)
from vllm_edits.edit_store import kinds as store_kinds
from vllm_edits.edit_store.architectures import ARCHITECTURES, supported
from vllm_edits.edit_store.authoring import formulas
from vllm_edits.edit_store.authoring.formula import edited, hook
from vllm_edits.edit_store.authoring.formulas import FORMULAS
from vllm_edits.edit_store.authoring.method import METHODS
from vllm_edits.edit_store.authoring.methods import find
from vllm_edits.edit_store.cli import app
from vllm_edits.edit_store.compare import compare
from vllm_edits.edit_store.compose import compose, conflicts
from vllm_edits.edit_store.edits import Array, Order
from vllm_edits.edit_store.errors import BundleRefused, InstallRefused, SettingsError, UnsupportedHost
from vllm_edits.edit_store.sites import Site
from vllm_edits.edit_store.verify import edit_rules
from vllm_edits.plugin.graph import kinds as graph_kinds
from vllm_edits.plugin.graph.kinds import SLOT_TENSORS
from vllm_edits.plugin.graph.reservation import Capacity, EditGroup, Reservation
from vllm_edits.plugin.graph.slot_bytes import slot_bytes
from vllm_edits.plugin.plan import Plan
from vllm_edits.plugin.weights.checkpoint import Checkpoint
from vllm_edits.server_config.settings import Reserve, read_settings

ROOT = Path(__file__).parents[2]
SITE = "layers.1.resid"
CLAMP = Clamp(site=SITE)
NUMBERS = {"bound": np.array([0.1], dtype=np.float32)}
RESERVE = {"edits": {"store": "/store", "reserve": [{"kind": "clamp", "site": "layers.*.resid"}]}}


@contextmanager
def knowing_the_toy_kind() -> Iterator[None]:
    """Inside, the toy kind is known; afterwards nothing of it is."""
    with ExitStack() as known:
        for registry in (KINDS, FORMULAS, SLOT_TENSORS):
            known.enter_context(registry.temporarily())
        for part in (store, formula, graph):
            part.add()
        yield


@pytest.fixture
def toy_kind() -> Iterator[None]:
    with knowing_the_toy_kind():
        yield


@pytest.fixture
def toy_model(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of the toy architecture, which is known inside."""
    with ARCHITECTURES.temporarily():
        toy_architecture.add()
        yield toy_architecture.tiny(tmp_path / "toy")


with_the_toy_kind = pytest.mark.usefixtures("toy_kind")


@pytest.fixture
def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(TOKENS, WIDTHS.hidden)


def made(*pairs: Any, name: str = "clamped") -> Bundle:
    return bundle_of(name, BASE, list(pairs) or [(CLAMP, NUMBERS)])


# -- the store ---------------------------------------------------------------------------------------------------------


@with_the_toy_kind
def test_a_manifest_of_the_toy_kind_is_read_where_it_is_known() -> None:
    bundle = made()
    data = bundle.manifest.to_bytes()
    assert json.loads(data)["edits"] == [
        {"kind": "clamp", "part": 1, "site": SITE,
         "scope": {"segment": "all", "first": None, "last": None, "tokens": None}}
    ]  # fmt: skip
    assert Manifest.from_bytes(data) == bundle.manifest
    assert check(bundle, BASE).keys() == {f"{SITE}/clamp/bound"}
    assert list(KINDS)[-1] == "clamp", "last at its site"


def test_and_refused_with_what_is_known_where_it_is_not() -> None:
    with knowing_the_toy_kind():
        data = made().manifest.to_bytes()
        assert read_settings(RESERVE).reserve == (Reserve(kind="clamp", site="layers.*.resid"),)
    with pytest.raises(BundleRefused, match=r"'clamp' found .* any of the expected tags: 'scale', .*, 'weight_delta'"):
        Manifest.from_bytes(data)
    with pytest.raises(SettingsError, match=r"should be 'scale', 'low_rank', .* or 'offset', found 'clamp'"):
        read_settings(RESERVE)


def test_none_of_it_is_left_behind() -> None:
    """Whatever tests ran before: the registries hold what the product has."""
    assert all("clamp" not in registry for registry in (KINDS, FORMULAS, SLOT_TENSORS))
    assert "ToyForCausalLM" not in ARCHITECTURES
    assert set(SLOT_TENSORS) == set(store_kinds.served_per_request()) < set(KINDS) == set(FORMULAS)


@with_the_toy_kind
@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ({"bound": [0.0]}, "bound"),
        ({"bound": [-1.0]}, "bound"),
        ({"bound": [np.nan]}, "not_finite"),
        ({"bound": [1.0, 2.0]}, "shape"),
        ({}, "missing_tensor"),
    ],
)
def test_bad_numbers_are_refused(numbers: dict[str, Any], code: str) -> None:
    check(made())
    with pytest.raises(BundleRefused) as refusal:
        check(made((CLAMP, numbers)))
    assert [reason.code for reason in refusal.value.reasons] == [code]


@with_the_toy_kind
def test_a_site_without_meaning_is_refused() -> None:
    (reason,) = edit_rules([Clamp(site="logits")], BASE)
    assert reason.message.startswith("kind 'clamp' has no meaning at logits; it can stand at embed.out")


@with_the_toy_kind
def test_it_is_shown_compared_and_composed(tmp_path: Path) -> None:
    made().save(tmp_path / "bundle")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 8,
        "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 9, "intermediate_size": 16}))  # fmt: skip

    def said(*arguments: str) -> Any:
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    rows = {row["site"]: row["kinds"] for row in said("sites", str(tmp_path))["sites"]}
    assert {"clamp" in kinds for site, kinds in rows.items() if site != "logits"} == {True}
    assert "clamp" not in rows["logits"]
    (row,) = said("inspect", str(tmp_path / "bundle"))
    assert (row["kind"], row["norm"], row["of"]) == ("clamp", 0.1, "bound of every channel")
    (change,) = compare(made(), made((CLAMP, {"bound": NUMBERS["bound"] * 2}))).edits
    assert (change.change, change.moved) == ("changed", pytest.approx(1.0))
    offset = (Offset(site=SITE), {"vector": np.ones(8, dtype=np.float32)})
    (found,) = conflicts(compose([made(), made(offset, name="moved")]))
    assert (found.first, found.second, found.effect) == (
        "clamped: clamp", "moved: offset", "the bound comes after it"
    )  # fmt: skip


@with_the_toy_kind
def test_it_is_refused_in_the_weights_with_a_reason() -> None:
    weights, bundle = plain_weights(TinyModel()), made((Clamp(site="layers.1.mlp.out"), NUMBERS))
    with pytest.raises(InstallRefused, match=r"clamp at layers\.1\.mlp\.out: a bound bends the vector") as refusal:
        weights.prepare(bundle.version, bundle.manifest, check(bundle))
    assert [reason.code for reason in refusal.value.reasons] == ["weights_mode"]


# -- the server --------------------------------------------------------------------------------------------------------


@with_the_toy_kind
def test_settings_reserve_it_and_a_refusal_names_the_setting() -> None:
    asked = read_settings(RESERVE).entries
    reservation = Reservation.from_settings(asked, supported(BASE.architecture), WIDTHS)
    group = EditGroup(Site(1, "resid"), "clamp", Site(1, "resid"))
    assert reservation.capacities[group] == Capacity()
    assert len(reservation.capacities) == WIDTHS.layers
    assert reservation.missing(made().manifest) == []
    (reason,) = Reservation({}).missing(made().manifest, slot_bytes(WIDTHS, torch.float32))
    assert reason.message == (
        'clamp of rank 1 at layers.1.resid: nothing is reserved there. Add {"kind":"clamp","site":"layers.1.resid"} to '
        "edits.reserve (64 bytes more per slot)"
    )


@with_the_toy_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_slot_bytes_are_those_of_its_tensors(dtype: torch.dtype) -> None:
    """One float32, alone in a cache line."""
    reservation = reservation_of(made())
    assert Plan.of(reservation, slot_bytes(WIDTHS, dtype)).slot == 64
    assert edited_model(TinyModel(), reservation, slots=3, dtype=dtype).bytes_reserved == 4 * 64


@with_the_toy_kind
def test_in_a_slot_it_is_its_formula_and_does_nothing_elsewhere(inputs: Tensor) -> None:
    """Beside the base model and a version of another kind; by the formula in numpy and by the one in torch."""
    clamped, other = made(), made((Offset(site=SITE), {"vector": np.ones(8, dtype=np.float32)}), name="other")
    model, plain = TinyModel(), TinyModel()
    edited = edited_model(model, reservation_of(clamped, other), slots=SLOTS)
    install(edited, 2, clamped)
    install(edited, 3, other)
    slots = [2, 0, 3] * (TOKENS // 3)
    set_step(edited, [RequestStep(claim_on(edited, slot), 1) for slot in slots])
    served, base = run(model, edited, inputs).numpy(), plain.logits(plain(inputs)).numpy()
    np.testing.assert_array_equal(served[1::3], base[1::3])
    np.testing.assert_allclose(served[::3], by_formula(plain, inputs, clamped)[::3], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(served[2::3], by_formula(plain, inputs, other)[2::3], rtol=1e-4, atol=1e-4)
    assert np.abs(served[::3] - base[::3]).max(-1).min() > 1e-2, "positive control: every token of its version is moved"

    def by_torch(site: str, value: Array) -> Array:
        x = torch.from_numpy(np.asarray(value))
        added = FORMULAS["clamp"].added(CLAMP, {"bound": torch.tensor([0.1])}, x, x)
        return (x + added).numpy() if site == SITE else value

    np.testing.assert_allclose(served[::3], tiny_by_formula(plain, inputs, by_torch)[::3], rtol=1e-4, atol=1e-4)
    edited.clear(2)
    set_step(edited, [RequestStep(None, TOKENS)])
    np.testing.assert_array_equal(run(model, edited, inputs).numpy(), base)


@with_the_toy_kind
def test_it_comes_after_all_others_of_its_site(inputs: Tensor) -> None:
    """By its order alone: a low rank, a filter and an offset come before it, whatever the order in the bundle."""
    others: list[Any] = [Offset(site=SITE), SubspaceFilter(site=SITE, rank=2), LowRank(site=SITE, reads=SITE, rank=1)]
    pairs: Pairs = [(CLAMP, NUMBERS), *((edit, random_numbers(edit, BASE, 3)) for edit in others)]
    bundle, model, plain = made(*pairs), TinyModel(), TinyModel()
    edited = edited_model(model, reservation_of(bundle), slots=1)
    install(edited, 1, bundle)
    set_step(edited, [RequestStep(claim_on(edited, 1), TOKENS)])
    served = run(model, edited, inputs)
    np.testing.assert_allclose(served, by_formula(plain, inputs, bundle), rtol=1e-4, atol=1e-4)
    first = edits_by_formula([(CLAMP.model_copy(update={"part": 1}), NUMBERS)])
    last = edits_by_formula(pairs[1:])
    otherwise = tiny_by_formula(plain, inputs, lambda site, value: last(site, first(site, value)))
    assert np.abs(served.numpy() - otherwise).max() > 0.1, "negative control: another order is felt"


@with_the_toy_kind
def test_scopes_and_strengths_are_the_servers_and_not_the_kinds(inputs: Tensor) -> None:
    """Half as strong in the prompt, and nothing behind it, with not a word about either in the toy's files."""
    edit = Clamp(site=SITE, scope=Scope(segment="prompt"))
    bundle = made((edit, NUMBERS))
    manifest = bundle.manifest.model_copy(update={"strength": Strength(minimum=0, maximum=1)})
    bundle = Bundle(manifest, bundle.tensor_bytes)
    model, plain = TinyModel(), TinyModel()
    edited = edited_model(model, reservation_of(bundle), slots=1)
    install(edited, 1, bundle)
    set_step(edited, [RequestStep(claim_on(edited, 1, 0.5), TOKENS, 0, TOKENS // 2)])
    served = run(model, edited, inputs).numpy()

    def half(site: str, value: Array) -> Array:
        return (value + np.clip(value, -0.1, 0.1)) / 2 if site == SITE else value

    front = TOKENS // 2
    np.testing.assert_allclose(served[:front], tiny_by_formula(plain, inputs, half)[:front], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(served[front:], plain.logits(plain(inputs)).numpy()[front:])


@with_the_toy_kind
def test_it_is_traced_in_one_graph_with_the_product_kinds(inputs: Tensor) -> None:
    others = [Offset(site=SITE), LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=2)]
    bundle = made((CLAMP, NUMBERS), *((edit, random_numbers(edit, BASE, 1)) for edit in others))
    model = TinyModel()
    edited = edited_model(model, reservation_of(bundle), slots=SLOTS)
    install(edited, 1, bundle)
    set_step(edited, [RequestStep(claim_on(edited, 1), TOKENS)])
    graphs: list[torch.fx.GraphModule] = []

    def look(found: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(found)
        return found.forward

    traced: Any = torch.compile(model, backend=look, fullgraph=True)
    assert torch.equal(traced(inputs), model(inputs))
    (found,) = graphs
    assert any(node.target == "clamp" for node in found.graph.nodes), "positive control"


@with_the_toy_kind
def test_proofs_and_benchmarks_take_it_by_themselves() -> None:
    labels = {label for label, (edit, _) in every_edit(BASE) if edit.kind == "clamp"}
    assert labels == {"clamp"}
    for _, (edit, numbers) in every_edit(BASE):
        if edit.kind == "clamp":
            check(made((edit, numbers)))


# -- architectures -----------------------------------------------------------------------------------------------------


def test_the_toy_architecture_has_sites_widths_and_biases(toy_model: Path) -> None:
    """By its entry alone: names in the config and the checkpoint, what it lacks, and what it has not."""
    base = identify(toy_model)
    assert (base.architecture, base.widths.mlp, base.widths.of("attn.z")) == ("ToyForCausalLM", 24, 16)
    assert base.biased == ("attn.out", "k.out", "q.out", "up.out", "v.out")
    found = json.loads(CliRunner().invoke(app, ["sites", str(toy_model), "--json"]).stdout)
    points = {row["site"].removeprefix("layers.0.") for row in found["sites"] if row["layer"] == 0}
    assert points == {
        "attn.in", "q.out", "k.out", "v.out", "attn.z", "attn.out", "mlp.in", "up.out", "mlp.h", "mlp.out", "resid",
    }  # fmt: skip
    assert found["hidden"]["gate.out"] == "ToyForCausalLM has no gate projection; the nearest point is up.out"
    weight, bias = Checkpoint(toy_model, supported("ToyForCausalLM"), base.widths).projection(Site(1, "k.out"))
    model: Any = ToyForCausalLM.from_pretrained(toy_model)
    fused = model.stem.blocks[1].mixer.read
    assert torch.equal(weight, fused.weight[16:32])
    assert bias is not None
    assert torch.equal(bias, fused.bias[16:32])


def test_every_site_of_it_is_met_in_its_width(toy_model: Path) -> None:
    model, base, seen = ToyForCausalLM.from_pretrained(toy_model), identify(toy_model), dict[str, int]()
    sites = supported("ToyForCausalLM").sites(base.widths.layers)
    for site in sites:

        def look(value: Tensor, name: str = str(site)) -> None:
            seen[name] = value.shape[-1]

        hook(model, site, look)
    model(torch.tensor([[1, 2, 3]]))
    assert seen == {str(site): base.widths.of(site.point) for site in sites}


@with_the_toy_kind
def test_formulas_on_it_are_what_edits_do_to_its_weights(toy_model: Path) -> None:
    """A low rank by a change of a weight, and the toy kind on the toy architecture."""
    model: Any = ToyForCausalLM.from_pretrained(toy_model, dtype=torch.float64).eval()
    base, ids = identify(toy_model), torch.tensor([[5, 17, 3, 8]])
    edit: Any = LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=2)
    numbers = random_numbers(edit, base, 1)
    with torch.no_grad():
        plain = model(ids).logits
        with edited(model, [(edit, numbers)]):
            by_hooks = model(ids).logits
        narrow = model.stem.blocks[1].ffn.narrow.weight
        narrow += torch.from_numpy(numbers["write"].T @ numbers["read"]).double()
        torch.testing.assert_close(by_hooks, model(ids).logits, rtol=1e-6, atol=1e-6)
        assert (by_hooks - plain).abs().max() > 1e-3
        seen: list[Tensor] = []
        with edited(model, [(CLAMP, NUMBERS)]):
            hook(model, Site(1, "resid"), lambda value: seen.append(value.clone()))  # type: ignore[func-returns-value]
            model(ids)
    (stream,) = seen
    assert stream.abs().max() == pytest.approx(0.1)
    assert (stream.abs() == stream.abs().max()).sum() > 1, "positive control: more than one channel would be larger"


def test_outside_it_is_no_architecture(tmp_path: Path) -> None:
    """And of its checkpoint only what all have is known."""
    base = identify(toy_architecture.tiny(tmp_path / "toy"))
    (reason,) = edit_rules([Offset(site=SITE)], base)
    assert reason.message.startswith("architecture ToyForCausalLM is not supported")
    with pytest.raises(UnsupportedHost, match="not supported"):
        supported("ToyForCausalLM")


# -- registering -------------------------------------------------------------------------------------------------------


@with_the_toy_kind
def test_a_name_is_registered_once() -> None:
    """Again the same is nothing; another thing of the name is refused, and so is a kind without one."""

    class Another(Clamp):
        pass

    class Nameless(Offset):
        kind: str

    for part in (store, formula, graph):
        part.add()
    with pytest.raises(ValueError, match="kind of edit 'clamp' is registered already"):
        store_kinds.register(Another)
    with pytest.raises(TypeError, match="Nameless: expected a field `kind: Literal"):
        store_kinds.register(Nameless)
    with pytest.raises(KeyError, match="slot tensors of kind 'magic' is not registered; known: "):
        _ = SLOT_TENSORS["magic"]


@with_the_toy_kind
def test_kinds_of_one_stage_are_computed_in_one_way() -> None:
    class Early(Clamp):
        order = Order(KINDS["low_rank"].order.stage, 5)

    Early.model_fields["kind"].default = "early"
    with pytest.raises(ValueError, match="share stage 30, and compute it otherwise"):
        graph_kinds.register(Early, graph.ClampSlots)


FOLDERS = {
    "edit_store/kinds": (store_kinds, store),
    "edit_store/authoring/formulas": (formulas, formula),
    "plugin/graph/kinds": (graph_kinds, graph),
}
"""What a kind has a module in, and the toy's."""


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_products_kinds_are_registered_by_the_calls_that_the_toy_makes(folder: str) -> None:
    """Each by the last statement of its module, which is found by its folder: no list names the product's kinds."""
    package, toy = FOLDERS[folder]
    assert toy.register is package.register
    registered = []
    for path in sorted((ROOT / folder).glob("*.py")):
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "register"]
        if path.name == "__init__.py":
            assert calls == []
            assert not named_kinds(tree)
        else:
            (call,) = calls
            assert isinstance(tree.body[-1], ast.Expr)
            assert tree.body[-1].value is call
            registered.append(ast.unparse(call.args[0]))
    kinds = KINDS if folder != "plugin/graph/kinds" else SLOT_TENSORS
    assert sorted(registered) == sorted(KINDS[name].__name__ for name in kinds)


def test_nothing_gets_past_register() -> None:
    """A registry is added to in one place."""
    sources = "".join(path.read_text() for path in product_files())
    for registry in ("KINDS", "FORMULAS", "SLOT_TENSORS", "ARCHITECTURES"):
        assert len(re.findall(rf"\b{registry}\.add\(", sources)) == 1


def product_files() -> list[Path]:
    folders = (ROOT / folder for folder in ("edit_store", "plugin", "server_config"))
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


NAMES = {kind.__name__: name for name, kind in KINDS.items()}
"""Of the product's kinds, by their classes'."""


def named_kinds(tree: ast.AST) -> set[str]:
    """The kinds that code names: by their class, or by their name as a whole string or in an import's path."""
    found = set[str]()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.ClassDef(name=word):
                found |= {NAMES[word]} if word in NAMES else set()
            case ast.Constant(value=str() as word):
                found |= {word} & set(NAMES.values())
            case ast.ImportFrom(module=str() as module, names=names):
                found |= {*module.split("."), *(each.name for each in names)} & set(NAMES.values())
                found |= {NAMES[each.name] for each in names if each.name in NAMES}
            case _:
                pass
    return found


@functools.cache
def naming() -> dict[Path, set[str]]:
    """The kinds that every file of the product names."""
    return {path: named_kinds(ast.parse(path.read_text())) for path in product_files()}


@pytest.mark.long
@pytest.mark.parametrize("kind", NAMES.values())
def test_a_kind_is_named_in_three_files(kind: str) -> None:
    """Where it is defined, its formula and its slots. Not counted: authoring methods, which build edits of a kind, the
    reservation profiles, which name what such methods need, and what the package exports by name."""
    exported, profiles = ROOT / "edit_store/__init__.py", ROOT / "server_config/profiles.py"
    exempt = [exported, profiles, *(ROOT / "edit_store/authoring").glob("*.py")]
    exempt += (ROOT / "edit_store/authoring/methods").glob("*.py")
    found = {str(path.relative_to(ROOT)) for path, kinds in naming().items() if kind in kinds and path not in exempt}
    served = [] if KINDS[kind].only_in_weights else ["plugin/graph/kinds"]
    assert found == {f"{folder}/{kind}.py" for folder in ("edit_store/kinds", "edit_store/authoring/formulas", *served)}
    assert kind in naming()[exported], "positive control"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_named_in_one_file(name: str) -> None:
    naming = [path for path in product_files() if f'"{name}"' in path.read_text()]
    assert naming == [ROOT / "edit_store/architectures.py"]


def test_an_authoring_method_is_one_file_that_nothing_names() -> None:
    """It registers itself, and only the demo asks for some by name."""
    methods = {path.stem for path in (ROOT / "edit_store/authoring/methods").glob("*.py")} - {"__init__"}
    find()
    assert {name.replace("-", "_") for name in METHODS} == methods
    for path in product_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "vllm_edits.edit_store.authoring.methods"
            ):
                assert not methods & {(node.module or "").rpartition(".")[2], *(each.name for each in node.names)}, path


def test_the_toys_are_as_many_files_as_is_said() -> None:
    assert len(list((ROOT / "tests/support/toy_kind").glob("*.py"))) == 3
    assert isinstance(graph.ClampSlots, type)
    assert issubclass(graph.ClampSlots, nn.Module)
