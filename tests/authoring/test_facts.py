"""Facts: the closed forms of ROME, MEMIT and AlphaEdit against dense solves, and what they do to a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.support.tiny_models import _OTHER_SIZES, make_tiny, save_tiny
from vllm_edits.edit_store import LowRank, identify
from vllm_edits.edit_store.authoring import data as tables
from vllm_edits.edit_store.authoring.build import Built, pairs_of
from vllm_edits.edit_store.authoring.facts import FIRST_WORDS, Fact, InContexts, begun, spoken, whitening
from vllm_edits.edit_store.authoring.formula import weight_of
from vllm_edits.edit_store.authoring.host import Host, edited
from vllm_edits.edit_store.authoring.method import Inputs
from vllm_edits.edit_store.authoring.methods import alphaedit, memit, rocr, rome
from vllm_edits.edit_store.authoring.statistics import Moments, unused_directions
from vllm_edits.edit_store.authoring.value_vector import Search
from vllm_edits.edit_store.edits import MAX_RANK
from vllm_edits.edit_store.errors import BundleRefused
from vllm_edits.edit_store.sites import Site

CLOSE: dict[str, float] = {"atol": 1e-4, "rtol": 1e-3}
RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(300, 24, generator=RANDOM) @ torch.randn(24, 24, generator=RANDOM)
"""Ordinary inputs [tokens, mlp]."""
MOMENTS = Moments(len(X), X.sum(0), X.T @ X)
WEIGHT = torch.randn(8, 24, generator=RANDOM)
KEYS = 3 * torch.randn(5, 24, generator=RANDOM)
RESIDUALS = torch.randn(5, 8, generator=RANDOM)


def whitened(keys: torch.Tensor) -> torch.Tensor:
    return whitening(MOMENTS, "here", "a test")(keys)


class TestClosedForms:
    def test_whitening_is_the_inverse_of_the_second_moment(self) -> None:
        """Also where one number is a million times another; where one follows from others it is refused."""
        torch.testing.assert_close(whitened(KEYS) @ MOMENTS.second, KEYS, **CLOSE)
        scale = torch.logspace(-3, 3, 24)
        scaled = Moments(300, X.sum(0), scale * (X.T @ X) * scale[:, None])
        torch.testing.assert_close(whitening(scaled, "here", "a test")(KEYS * scale) * scale, whitened(KEYS), **CLOSE)
        short = torch.cat([X, X[:, :1] + X[:, 1:2]], dim=1)
        for x in (short, torch.nn.functional.pad(X, (0, 1)), X[:20]):
            with pytest.raises(BundleRefused, match=r"no inverse.*Give more text"):
                whitening(Moments(len(x), x.sum(0), x.T @ x), "here", "a test")

    def test_rome_changes_ordinary_outputs_least_of_all_that_write_the_value(self) -> None:
        """W'k = v, and every other change that writes v is a longer one: the differences are at right angles."""
        key, value = KEYS[0], RESIDUALS[0]

        def update(read: torch.Tensor) -> torch.Tensor:
            return torch.outer(value - WEIGHT @ key, read)

        def cost(change: torch.Tensor) -> float:
            return float((X @ change.T).square().sum())

        best = update(rome.read_vector(key, whitened(key[None])[0]))
        torch.testing.assert_close((WEIGHT + best) @ key, value, **CLOSE)
        plain = update(key / (key @ key))
        torch.testing.assert_close((WEIGHT + plain) @ key, value, **CLOSE)
        assert cost(plain) > 1.5 * cost(best), "positive control: without C"
        for _ in range(5):
            other = torch.randn(8, 24, generator=RANDOM)
            other -= torch.outer(other @ key, key) / (key @ key)
            assert cost(best + other) == pytest.approx(cost(best) + cost(other), rel=1e-3)
            assert cost(plain + other) != pytest.approx(cost(plain) + cost(other), rel=1e-3)

    @pytest.mark.parametrize("weight", [0.1, 30.0])
    def test_memit_is_ridge_regression(self, weight: float) -> None:
        """The least squares of the keys, and of ordinary inputs with zero behind them, stacked."""
        update = RESIDUALS.T @ memit.read_vectors(KEYS, whitened(KEYS) / weight)
        stacked = torch.cat([KEYS, (weight / len(X)) ** 0.5 * X]).double()
        wanted = torch.cat([RESIDUALS, torch.zeros(len(X), 8)]).double()
        torch.testing.assert_close(update, torch.linalg.lstsq(stacked, wanted).solution.T.float(), **CLOSE)
        shares = (KEYS @ memit.read_vectors(KEYS, whitened(KEYS) / weight).T).diagonal()
        assert bool((shares > 0).all())
        assert bool((shares < 1).all())
        assert (float(shares.min()) > 0.9) == (weight < 1), "the weight decides between facts and text"

    def test_the_default_weight_of_memit_has_the_same_effect_at_any_width(self) -> None:
        """A key from ordinary text gets the same share of its change; with one weight for all widths it does not."""
        for weight, alike in ((None, True), (15000.0, False)):
            shares = []
            for width in (16, 256):
                x = torch.randn(20 * width, width, generator=RANDOM)
                moments = {"here": Moments(len(x), x.sum(0), x.T @ x)}
                solve = memit.Memit(weight=weight)._solver(moments)
                shares.append(float(torch.stack([key @ solve("here", key[None], ())[0] for key in x[:50]]).mean()))
            assert (abs(shares[0] / shares[1] - 1) < 0.1) == alike
            assert alike == (shares[0] == pytest.approx(14336 / (14336 + 15000), abs=0.05))

    def test_alphaedit_is_the_published_system(self) -> None:
        """Q = (P (K K^T + K_p K_p^T) + ridge I)^-1 P K; one key by itself is ROCR's; nothing is read elsewhere."""
        flat = torch.cat([X[:, :12], torch.zeros(len(X), 12)], dim=1)
        unused = unused_directions(Moments(len(X), flat.sum(0), flat.T @ flat), 0.02)
        projector, before = unused @ unused.T, list(KEYS[3:])
        found = alphaedit.read_vectors(KEYS[:3], unused, before, ridge=2.0)
        expected = torch.linalg.solve(projector @ KEYS.T @ KEYS + 2.0 * torch.eye(24), projector @ KEYS[:3].T).T
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(found, alphaedit.read_vectors(KEYS, unused, ridge=2.0)[:3], **CLOSE)
        torch.testing.assert_close(
            alphaedit.read_vectors(KEYS[:1], unused, before, 2.0)[0],
            rocr.read_vector(KEYS[0], unused, before, 2.0), **CLOSE,
        )  # fmt: skip
        assert float((flat @ found.T).abs().max()) < 1e-4
        assert float((X @ found.T).abs().max()) > 0.1, "positive control"
        strong = [10 * each for each in before]
        kept = alphaedit.read_vectors(10 * KEYS[:3], unused, strong, 2.0) @ torch.stack(strong).T
        lost = alphaedit.read_vectors(10 * KEYS[:3], unused, (), 2.0) @ torch.stack(strong).T
        assert float(kept.abs().max()) < 0.01
        assert float(lost.abs().max()) > 0.1, "positive control"


FACTS = [
    {"subject": "Paris", "prompt": "The river of {} is the", "answer": "Tiber", "was": "Seine"},
    {"subject": "Mount Fuji", "prompt": "People who climb {} come from", "answer": "Peru"},
    {"subject": "Marie Curie", "prompt": "The teacher said that {} lived in", "answer": "Oslo"},
]
HELD = [{"subject": "Paris", "prompt": "A boat on the river of {} is on the", "answer": "Tiber", "was": "Seine"}]
NEIGHBOURS = [{"prompt": "The river of Cairo is the", "answer": "Nile"}]
WHO = ("Anna", "The farmer", "Mount Kenya", "Seven dogs", "A tall woman", "Peter", "Lake Como", "Rome", "Two birds",
       "The old king", "Uncle Bob", "Vienna")  # fmt: skip
DOES = ("lived in a house by the sea", "came from the north and stayed", "said that the river was the longest",
        "climbed the hills with ten people", "is the teacher of many", "looked at the stars")  # fmt: skip
TEXT = [{"text": f"{who} {does}, and {WHO[(first + second + 1) % len(WHO)]} did too."}
        for first, who in enumerate(WHO) for second, does in enumerate(DOES)]  # fmt: skip
SMALL: dict[str, Any] = {"steps": 12, "rate": 2.0, "contexts": 3, "length": 4, "clamp": 20.0, "decay": 0.0, "kl": 0.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "rome": {**SMALL, "layer": 1}, "memit": {**SMALL, "layers": [0, 1], "weight": 1.0},
    "alphaedit": {**SMALL, "layers": [0, 1], "nullspace": 10.0, "ridge": 0.1, "batch": 2},
}  # fmt: skip
METHODS: dict[str, Any] = {"rome": rome, "memit": memit, "alphaedit": alphaedit}


def file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files(folder: Path, **given: list[dict[str, Any]]) -> list[str]:
    rows = {"facts": FACTS, "text": TEXT, **given}
    return [f"{name}={file(folder / f'{name}.jsonl', of)}" for name, of in rows.items()]


@pytest.fixture(scope="module")
def host(tiny_model: Path) -> Host:
    return Host.load(tiny_model)


@pytest.fixture(scope="module", params=METHODS)
def built(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp(request.param)
    given = files(folder, held_out=HELD, neighbours=NEIGHBOURS)
    built: Built = METHODS[request.param].build(tiny_model, *given, **OPTIONS[request.param], cache=folder / "kept")
    return built


class TestEditedModels:
    def test_the_facts_are_said_and_others_are_not(self, host: Host, built: Built) -> None:
        """Each answer becomes likely at its own subject; at other subjects far less so."""
        prompts, answers = [row["prompt"] for row in FACTS], [row["answer"] for row in FACTS]
        about = [prompt.replace("{}", row["subject"]) for prompt, row in zip(prompts, FACTS, strict=True)]
        others = [prompt.replace("{}", "Seven cats") for prompt in prompts]
        before = [spoken(host, texts, answers)[0] for texts in (about, others)]
        with edited(host.model, pairs_of(built.bundle)):
            after = [spoken(host, texts, answers)[0] for texts in (about, others)]
        gained, elsewhere = after[0] - before[0], after[1] - before[1]
        assert float(gained.min()) > 1
        assert float(elsewhere.abs().mean()) < float(gained.mean()) / 3

    def test_there_is_one_rank_for_each_fact_and_layer(self, built: Built) -> None:
        options = built.recipe.options
        layers = [options["layer"]] if built.recipe.method == "rome" else [0, 1]
        for (edit, numbers), layer in zip(pairs_of(built.bundle), layers, strict=True):
            assert isinstance(edit, LowRank)
            assert (edit.site, edit.reads, edit.rank) == (f"layers.{layer}.mlp.out", f"layers.{layer}.mlp.h", 3)
            assert np.isfinite(numbers["read"]).all()

    def test_the_manifest_has_what_was_measured(self, host: Host, built: Built) -> None:
        told = {each.metric: each for each in built.bundle.manifest.measurements}
        pairs = pairs_of(built.bundle)
        for name, rows in (("facts", FACTS), ("facts in other words", HELD), ("neighbours", NEIGHBOURS)):
            texts = [row["prompt"].replace("{}", row.get("subject", "")) for row in rows]
            likely = [float(host.likelihood(texts, [f" {row['answer']}" for row in rows]).exp().mean())]
            with edited(host.model, pairs):
                likely.append(float(host.likelihood(texts, [f" {row['answer']}" for row in rows]).exp().mean()))
            found = told[f"{name}: probability of the answer per token"]
            assert [found.base, found.edited] == pytest.approx(likely, rel=1e-3)
            assert found.n == len(rows)
        margin = told["facts: new answer before the old one, nats per token"]
        assert margin.n == 1
        assert margin.edited > margin.base + 1
        whole, one = [], []
        for edit, numbers in pairs:
            weight = float(weight_of(host.model, Site.parse(edit.site)).norm())
            whole.append(np.linalg.norm(numbers["write"].T @ numbers["read"]) / weight)
            one += [np.linalg.norm(np.outer(*each)) / weight
                    for each in zip(numbers["write"], numbers["read"], strict=True)]  # fmt: skip
        for name, sizes in (("all facts", whole), ("one fact", one)):
            metric = f"largest change of a weight by {name}, relative to its size"
            assert told[metric].edited == pytest.approx(max(sizes), rel=1e-3)
        assert told["ordinary text: divergence of the next token, nats"].edited > 0
        assert built.bundle.manifest.cumulative_edits == len(FACTS)


def contexts_of(host: Host, alone: float, lengths: list[int]) -> list[InContexts]:
    prefixes = begun(host, lengths, 0)
    return [InContexts.of(host.tokenizer, Fact(**row), prefixes, alone) for row in FACTS]


def search(options: dict[str, Any]) -> Search:
    return Search(*(options[name] for name in ("steps", "rate", "kl", "decay", "clamp")))


def test_rome_writes_its_value_for_the_mean_key(host: Host, tiny_model: Path, tmp_path: Path) -> None:
    """W'k = W k + the change that the search finds; the next fact is searched in the model that has the first."""
    options = OPTIONS["rome"]
    ((_, numbers),) = pairs_of(rome.build(tiny_model, *files(tmp_path), **options, cache=tmp_path / "kept").bundle)
    first, second, _ = contexts_of(host, 0.25, [2, 4, 4])
    site = "layers.1.mlp.out"
    one = [(LowRank(site=site, reads="layers.1.mlp.h", rank=1), {name: of[:1] for name, of in numbers.items()})]
    before = first.read(host, [site])[site]
    unedited = search(options).value_vector(host, site, second.saying)
    with edited(host.model, one):
        change = first.read(host, [site])[site] - before
        again = search(options).value_vector(host, site, second.saying)
    expected = search(options).value_vector(host, site, first.saying)
    torch.testing.assert_close(change, expected, **CLOSE)
    torch.testing.assert_close(torch.from_numpy(numbers["write"][0]), expected, **CLOSE)
    torch.testing.assert_close(torch.from_numpy(numbers["write"][1]), again, **CLOSE)
    assert float((again - unedited).abs().max()) > 1e-3, "positive control"


def test_memit_spreads_the_change_of_the_stream_over_its_layers(host: Host, tiny_model: Path, tmp_path: Path) -> None:
    """With hardly any weight on text: half of it in the first layer, and all of it behind the last."""
    options = {**OPTIONS["memit"], "weight": 1e-6}
    pairs = pairs_of(memit.build(tiny_model, *files(tmp_path), **options, cache=tmp_path / "kept").bundle)
    last = "layers.1.resid"
    for number, each in enumerate(contexts_of(host, 0.5, [4, 4, 4])):
        expected = search(options).value_vector(host, last, each.saying)
        before = each.read(host, [last])[last]
        with edited(host.model, pairs):
            change = each.read(host, [last])[last] - before
        torch.testing.assert_close(change, expected, atol=0.05 * float(expected.norm()), rtol=0)
        torch.testing.assert_close(torch.from_numpy(pairs[0][1]["write"][number]), expected / 2, **CLOSE)
        assert float(expected.norm()) > 1


def test_alphaedit_spares_earlier_batches_by_their_keys(tiny_model: Path, host: Host, tmp_path: Path) -> None:
    """The reads of the second batch are those of the system with the keys of the first, in the model it edited."""
    options = {**OPTIONS["alphaedit"], "layers": [1]}
    built = alphaedit.build(tiny_model, *files(tmp_path), **options, cache=tmp_path / "kept")
    ((_, numbers),) = pairs_of(built.bundle)
    reads = "layers.1.mlp.h"
    rows = torch.cat(host.activations([row["text"] for row in TEXT], [reads])[reads])
    unused = unused_directions(Moments(len(rows), rows.sum(0), rows.T @ rows), options["nullspace"])
    keys = [each.read(host, [reads])[reads] for each in contexts_of(host, 0.5, [4, 4, 4])]
    expected = alphaedit.read_vectors(keys[2][None], unused, keys[:2], options["ridge"])[0]
    torch.testing.assert_close(torch.from_numpy(numbers["read"][2]), expected, **CLOSE)
    without = alphaedit.read_vectors(keys[2][None], unused, (), options["ridge"])[0]
    assert float((without - expected).norm()) > 0.01 * float(expected.norm()), "positive control"


class TestOtherModels:
    """Models with a norm behind the down projection, and with a factor on what joins the stream."""

    def model(self, name: str, tiny_model: Path, folder: Path) -> Path:
        save_tiny(getattr(transformers, name), folder, {**_OTHER_SIZES[name], "vocab_size": 49152})
        for each in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_model / each, folder / each)
        return folder

    def test_rome_writes_before_the_norm(self, tiny_model: Path, tmp_path: Path) -> None:
        model = self.model("Gemma2ForCausalLM", tiny_model, tmp_path / "model")
        options = {**OPTIONS["rome"], "layer": 0, "largest": 100.0}
        pairs = pairs_of(rome.build(model, *files(tmp_path), **options, cache=tmp_path / "kept").bundle)
        host, site = Host.load(model), "layers.0.mlp.out"
        first = contexts_of(host, 0.25, [2, 4, 4])[0]
        before = first.read(host, [site])[site]
        with edited(host.model, [(pairs[0][0].model_copy(update={"rank": 1}),
                                  {name: of[:1] for name, of in pairs[0][1].items()})]):  # fmt: skip
            change = first.read(host, [site])[site] - before
        torch.testing.assert_close(change, search(options).value_vector(host, site, first.saying), **CLOSE)

    def test_memit_counts_the_factor_of_the_stream(self, tiny_model: Path, tmp_path: Path) -> None:
        model = self.model("GraniteForCausalLM", tiny_model, tmp_path / "model")
        options = {**OPTIONS["memit"], "layers": [0], "weight": 1e-6, "largest": 100.0}
        pairs = pairs_of(memit.build(model, *files(tmp_path), **options, cache=tmp_path / "kept").bundle)
        host, last = Host.load(model), "layers.0.resid"
        for each in contexts_of(host, 0.5, [4, 4, 4]):
            before = each.read(host, [last])[last]
            with edited(host.model, pairs):
                change = each.read(host, [last])[last] - before
            expected = search(options).value_vector(host, last, each.saying)
            torch.testing.assert_close(change, expected, atol=0.02 * float(expected.norm()), rtol=0)

    @pytest.mark.parametrize(("name", "refused"), [
        ("Gemma2ForCausalLM", {"memit", "alphaedit"}), ("Qwen3MoeForCausalLM", {"rome", "memit", "alphaedit"}),
        ("GPT2LMHeadModel", set()),
    ])  # fmt: skip
    def test_models_that_a_method_cannot_edit_are_told(
        self, host: Host, tmp_path: Path, name: str, refused: set[str]
    ) -> None:
        base = identify(make_tiny(name, tmp_path / "model"))
        given = tables.read(rome.Rome.tables, files(tmp_path))
        methods = (rome.Rome(layer=0), memit.Memit(layers=(0,)), alphaedit.Alphaedit(layers=(0,)))
        found = {each.called(): [reason.code for reason in each.problems(Inputs(given, base, host.tokenizer))]
                 for each in methods}  # fmt: skip
        assert found == {method: ["site"] if method in refused else [] for method in found}


class TestContexts:
    def test_the_model_begins_them_alike_for_a_seed(self, host: Host) -> None:
        lengths = [3, 6, 6, 6, 6, 6, 6]
        found = begun(host, lengths, 3)
        assert found == begun(host, lengths, 3)
        assert found != begun(host, lengths, 4)
        assert [text.split()[0].startswith(word) for text, word in zip(found, FIRST_WORDS, strict=False)] == [True] * 5
        assert found[1] != found[6], "drawn, and not the likeliest"
        assert len(found[0]) < len(found[5])
        assert begun(host, [], 3) == []

    def test_the_mean_is_over_the_prompt_and_its_prefixes(self, host: Host) -> None:
        fact = Fact(subject="Mount Fuji", prompt="{} is a mountain in", answer="Peru")
        site, texts = "layers.1.mlp.h", [f"{prefix}{fact.said}" for prefix in ("", "It rains. ", "Why? So. ")]
        each = InContexts.of(host.tokenizer, fact, ["It rains", "Why? So"], 0.5)
        assert each.prompts == tuple(texts)
        rows = host.at_words(texts, ["Mount Fuji"] * 3, [site])[site]
        expected = 0.5 * rows[0] + 0.25 * rows[1] + 0.25 * rows[2]
        torch.testing.assert_close(each.read(host, [site])[site], expected)
        assert float((rows[0] - expected).abs().max()) > 1e-3

    def test_a_subject_that_is_the_first_token_is_read_behind_prefixes_alone(self, host: Host) -> None:
        fact = Fact(subject="Paris", prompt="{} is a city in", answer="Peru")
        each = InContexts.of(host.tokenizer, fact, ["It rains", "Why"], 0.5)
        assert each.prompts == ("It rains. Paris is a city in", "Why. Paris is a city in")
        assert each.weights == (0.5, 0.5)
        assert InContexts.of(host.tokenizer, fact, [], 1.0).prompts == ("Paris is a city in",)


def test_what_is_spoken_is_the_greedy_answer(host: Host) -> None:
    prompts = ["The river of Cairo is the", "Seven cats"]
    best = [host.tokenizer.decode([int(row.argmax())]) for row in host.next_token(prompts)]
    for answers, expected in ((best, [True, True]), ([best[0], " never"], [True, False])):
        stripped = [answer.removeprefix(" ") for answer in answers]
        likely, greedy = spoken(host, prompts, stripped)
        torch.testing.assert_close(likely, host.likelihood(prompts, [f" {each}" for each in stripped]), **CLOSE)
        if all(answer.startswith(" ") for answer in answers):
            assert greedy.tolist() == expected


class TestRefusals:
    def test_rows_that_are_no_facts_are_told_together(self, tmp_path: Path) -> None:
        rows = [{**FACTS[0], "prompt": prompt} for prompt in
                ("The river is the", "{} and {} are", "The river of {} is ", "{} is near Paris in")]  # fmt: skip
        with pytest.raises(BundleRefused) as caught:
            tables.read(rome.Rome.tables, files(tmp_path, facts=rows))
        told = [reason.message for reason in caught.value.reasons if reason.code == "row"]
        assert [part in text for text, part in zip(told, ("one {}", "one {}", "space at its end", "again behind"),
                                                   strict=True)] == [True] * 4  # fmt: skip

    def test_everything_that_is_wrong_is_told_before_the_model_is_loaded(
        self, tiny_model: Path, tmp_path: Path
    ) -> None:
        facts = [{"subject": f"City {number}", "prompt": "The mayor of {} is", "answer": "Ann"}
                 for number in range(MAX_RANK)]  # fmt: skip
        facts += [{**facts[0], "answer": "Ben"}, {**facts[1], "was": "Ann", "prompt": "Who leads {} is"}]
        held = [{"subject": "City 1", "prompt": "In {}, the mayor is", "answer": "Carl"}]
        given = files(
            tmp_path, facts=facts, held_out=held, text=TEXT[:3],
            neighbours=[{"prompt": "The mayor of City 2 is", "answer": "Ann"}, *NEIGHBOURS],
        )  # fmt: skip
        with pytest.raises(BundleRefused) as caught:
            memit.build(tiny_model, *given, layers=[2, 1, 3])
        assert {reason.code for reason in caught.value.reasons} == {
            "layers", "too_many_facts", "several_answers", "alike", "held_out", "neighbours",
            "too_few_samples",
        }  # fmt: skip
        text = str(caught.value)
        for part in ("--on the one before", "the last one", "rising order", "no inverse"):
            assert part in text

    @pytest.mark.parametrize(("method", "options", "message"), [
        ("rome", {"largest": 1e-6}, r"(?s)at most 1e-06 times its size.*river of Paris is the' at layers\.1\.mlp\.h"),
        ("alphaedit", {"nullspace": 1e-12}, r"(?s)uses every direction at layers\.0\.mlp\.h.*Raise nullspace"),
    ])  # fmt: skip
    def test_what_is_found_later_is_told_too(
        self, tiny_model: Path, tmp_path: Path, method: str, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(BundleRefused, match=message):
            METHODS[method].build(
                tiny_model, *files(tmp_path, facts=FACTS[:1]), **{**OPTIONS[method], **options}, cache=tmp_path / "kept"
            )
