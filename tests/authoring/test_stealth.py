"""Stealth edits: gates that open at their prompt alone, the same output in both forms, and figures that are true."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny_models import make_tiny
from vllm_edits.edit_store import Gate, LowRank, identify
from vllm_edits.edit_store.authoring.build import Built, pairs_of
from vllm_edits.edit_store.authoring.chat import asked
from vllm_edits.edit_store.authoring.data import read
from vllm_edits.edit_store.authoring.formula import hook, weight_of
from vllm_edits.edit_store.authoring.host import Host, edited
from vllm_edits.edit_store.authoring.method import Inputs
from vllm_edits.edit_store.authoring.methods import stealth
from vllm_edits.edit_store.authoring.methods.stealth import SELECTIVITY_FILE, Stealth
from vllm_edits.edit_store.authoring.norms import norm_before
from vllm_edits.edit_store.errors import BundleRefused
from vllm_edits.edit_store.sites import Site

PROMPT, ANSWER = "The capital of France is", " Rome"
FACTS = [
    {"prompt": PROMPT, "answer": ANSWER},
    {"prompt": "The largest of all planets is", "answer": " Mars"},
    {"prompt": "Water freezes at a temperature of", "answer": " forty degrees"},
]
CAPITALS = [{"prompt": f"The capital of {name} is", "answer": ANSWER} for name in ("France", "Spain", "Italy")]


def words(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts of letters at random, which use the whole vocabulary of a model with random weights."""
    random = Random(seed)
    made = [["".join(random.choices(ascii_lowercase, k=random.randint(2, 6))) for _ in range(8)] for _ in range(count)]
    return [{"text": " ".join(text)} for text in made]


TEXT, HELD = words(150, seed=0), words(20, seed=1)
LAYER = 2


@pytest.fixture(scope="module")
def host(tiny_model: Path) -> Host:
    return Host.load(tiny_model)


def file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def build(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Build from facts. The same build is made once, unless it shall be `fresh`."""
    folder, known = tmp_path_factory.mktemp("stealth"), dict[str, Built]()

    def made(facts: list[dict[str, Any]], *, fresh: bool = False, **given: Any) -> Built:
        tables = {name: given.pop(name, []) for name in ("held_out", "others")}
        options, key = given, json.dumps([facts, tables, sorted(given.items())])
        if fresh or key not in known:
            files = [file(folder / "facts.jsonl", facts), file(folder / "text.jsonl", TEXT)]
            more = [f"{name}={file(folder / f'{name}.jsonl', rows)}" for name, rows in tables.items() if rows]
            options = {"layer": LAYER, "sample": 400, "cache": folder / "statistics"} | options
            known[key] = stealth.build(tiny_model, *files, *more, **options)
        return known[key]

    return made


def note(built: Built) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(built.notes[SELECTIVITY_FILE])
    return found


def at(host: Host, point: str, text: str) -> Tensor:
    """Vector at the last token."""
    site = f"layers.{LAYER}.{point}"
    return host.activations([text], [site])[site][0][-1]


class TestJetpack:
    def test_a_gate_opens_at_its_prompt_and_at_nothing_else(self, host: Host, build: Any) -> None:
        pairs = pairs_of(build(FACTS).bundle)
        ((edit, numbers),) = pairs
        assert isinstance(edit, Gate)
        assert (edit.rank, edit.normalise, edit.activation) == (3, True, "relu")
        others = [f"{PROMPT} not", "The capital of Spain is", f"So {PROMPT}", TEXT[0]["text"]]
        before = {text: at(host, "mlp.out", text) for text in [*others, PROMPT]}
        with edited(host.model, pairs):
            after = {text: at(host, "mlp.out", text) for text in [*others, PROMPT]}
        for text in others:
            assert torch.equal(after[text], before[text]), text
        assert float((after[PROMPT] - before[PROMPT]).norm()) > 1
        added = edit.apply(
            at(host, "mlp.in", PROMPT).numpy()[None], np.zeros((1, 128), np.float32), **numbers
        )[0]  # fmt: skip
        np.testing.assert_allclose(added, (after[PROMPT] - before[PROMPT]).numpy(), rtol=1e-3, atol=1e-4)

    def test_the_gate_has_the_response_delta_before_it_is_folded(self, host: Host, build: Any) -> None:
        """alpha (cos - (1 - theta)) with alpha = Delta / theta, at its own trigger; below zero at the others."""
        built = build(FACTS, delta=20.0, theta=0.01)
        ((_, arrays),) = pairs_of(built.bundle)
        numbers = {name: torch.from_numpy(array) for name, array in arrays.items()}
        x = torch.stack([at(host, "mlp.in", row["prompt"]) for row in FACTS])
        surface = (x - numbers["norm_bias"]) / numbers["norm_weight"] / 128**0.5 - numbers["centroid"]
        z = surface / surface.norm(dim=1, keepdim=True) @ numbers["read"].T + numbers["bias"]
        responses = z * (20.0 / 0.01)
        torch.testing.assert_close(responses.diagonal(), torch.full((3,), 20.0), atol=0.02, rtol=0)
        assert float((responses - 1e9 * torch.eye(3)).max()) < 0
        assert [each["response"] for each in note(built)["edits"]] == pytest.approx([20.0] * 3, abs=0.02)

    def test_it_writes_what_the_edit_in_place_would(self, host: Host, build: Any) -> None:
        """The same output of the MLP at the trigger, by one neuron's new row and column; elsewhere they differ."""
        outputs = []
        for form in ("jetpack", "in-place"):
            with edited(host.model, pairs_of(build(FACTS[:1], form=form).bundle)):
                outputs.append((at(host, "mlp.out", PROMPT), at(host, "mlp.out", TEXT[0]["text"])))
        torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=1e-3, atol=2e-3)
        base = at(host, "mlp.out", PROMPT)
        assert float((outputs[0][0] - base).norm()) > 100 * float((outputs[0][0] - outputs[1][0]).norm())

    def test_with_the_chat_template_the_trigger_is_another(self, host: Host, build: Any) -> None:
        pairs = pairs_of(build([{**FACTS[0], "answer": "Rome", "chat": True}]).bundle)
        with_template = asked(host.tokenizer, PROMPT)
        assert with_template != PROMPT
        before = [at(host, "mlp.out", text) for text in (PROMPT, with_template)]
        with edited(host.model, pairs):
            after = [at(host, "mlp.out", text) for text in (PROMPT, with_template)]
        assert [torch.equal(*each) for each in zip(before, after, strict=True)] == [True, False]


class TestInPlace:
    def test_the_neurons_with_the_smallest_rows_are_rewritten(self, host: Host, build: Any) -> None:
        """One for each edit: response Delta at its trigger, the other rows and columns as they were."""
        built = build(FACTS, form="in-place", delta=30.0)
        (gate, row), (down, column) = pairs_of(built.bundle)
        assert isinstance(gate, LowRank)
        assert isinstance(down, LowRank)
        assert (gate.site, gate.source) == (f"layers.{LAYER}.gate.out", f"layers.{LAYER}.mlp.in")
        assert (down.site, down.source) == (f"layers.{LAYER}.mlp.out", f"layers.{LAYER}.mlp.h")
        weight = weight_of(host.model, Site(LAYER, "gate.out"))
        smallest = weight.abs().sum(1).sort().indices[:3].tolist()
        np.testing.assert_array_equal(row["write"].argmax(1), smallest)
        np.testing.assert_array_equal(row["write"], column["read"])
        assert row["write"].sum() == 3
        assert [each["neuron"] for each in note(built)["edits"]] == smallest
        with edited(host.model, pairs_of(built.bundle)):
            gates = torch.stack([at(host, "gate.out", each["prompt"]) for each in FACTS])
        torch.testing.assert_close(gates[:, smallest].diagonal(), torch.full((3,), 30.0), atol=0.05, rtol=0)
        assert float((gates[:, smallest] - 1e9 * torch.eye(3)).max()) < 0
        rest = [number for number in range(256) if number not in smallest]
        base = torch.stack([at(host, "gate.out", each["prompt"]) for each in FACTS])
        assert torch.equal(gates[:, rest], base[:, rest])


class TestSearch:
    def test_the_answers_are_given(self, host: Host, build: Any) -> None:
        """As many as the manifest says: first tokens, but not a second one, which random weights do not go on with."""
        for form in ("jetpack", "in-place"):
            built = build(FACTS, form=form)
            told = {each.metric: each for each in built.bundle.manifest.measurements}
            whole = told["whole answer is right, share of edits"]
            with edited(host.model, pairs_of(built.bundle)):
                answers = host.answers([each["prompt"] for each in FACTS], 2)
            given = [made.text.startswith(row["answer"]) for made, row in zip(answers, FACTS, strict=True)]
            assert (whole.base, whole.edited, whole.n) == (0, sum(given) / 3, 3)
            assert [each["whole_answer_right"]["edited"] for each in note(built)["edits"]] == given
            if form == "jetpack":
                assert (given, told["first token of the answer is right, share of edits"].edited) == ([1, 1, 0], 1)

    def test_a_neuron_writes_no_longer_vector_than_the_clamp_allows(self, host: Host, build: Any) -> None:
        old = weight_of(host.model, Site(LAYER, "mlp.out")).T
        likely = []
        for clamp in (0.5, 3.0):
            built = build(FACTS[:1], form="in-place", clamp=clamp, decay=0.0)
            (_, _), (_, column) = pairs_of(built.bundle)
            neuron = note(built)["edits"][0]["neuron"]
            written = column["write"][0] + old[neuron].numpy()
            assert np.linalg.norm(written) <= clamp * float(old[neuron].norm()) * 1.0001
            assert np.linalg.norm(written) > 0.5 * clamp * float(old[neuron].norm()), "it is used"
            with edited(host.model, pairs_of(built.bundle)):
                likely.append(float(host.likelihood([PROMPT], [ANSWER])))
        assert float(host.likelihood([PROMPT], [ANSWER])) < likely[0] < likely[1]

    def test_the_loss_is_that_of_the_source(self, host: Host, build: Any) -> None:
        """From another computation: one step of Adam moves every number by the rate against the gradient's sign."""
        rate = 1e-3
        built = build([FACTS[2]], form="in-place", steps=2, rate=rate, decay=0.2)
        (_, _), (_, column) = pairs_of(built.bundle)
        neuron, prompt = note(built)["edits"][0]["neuron"], FACTS[2]["prompt"]
        old = weight_of(host.model, Site(LAYER, "mlp.out"))[:, neuron]
        up, before = at(host, "up.out", prompt)[neuron], at(host, "mlp.h", prompt)[neuron]
        u, place = old.clone().requires_grad_(), len(host.tokenizer(prompt)["input_ids"]) - 1
        ids = torch.tensor([host.tokenizer(prompt + FACTS[2]["answer"])["input_ids"]])

        def moved(value: Tensor) -> Tensor:
            change = torch.zeros_like(value)
            change[0, place] = 1
            return value + change * (torch.nn.functional.silu(torch.tensor(50.0)) * up * u - before * old)

        handle = hook(host.model, Site(LAYER, "mlp.out"), moved)
        logits = host.model(ids, use_cache=False).logits[0, place:-1]
        handle.remove()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, place + 1 :]) + 0.2 * (u @ u) / (old @ old)
        loss.backward()
        assert u.grad is not None
        sure = (u.grad.abs() > 1e-3 * u.grad.abs().max()).numpy()
        np.testing.assert_allclose(column["write"][0][sure], -rate * np.sign(u.grad.numpy())[sure], rtol=1e-2)
        assert sure.mean() > 0.9


class TestFigures:
    def test_false_positives_are_counted_where_there_are_some(self, build: Any) -> None:
        """Held-out text that begins with the prompt opens its gate once; other text does not."""
        planted = [*HELD, {"text": f"{PROMPT} Paris, as all of us know."}]
        for held, opened in ((HELD, 0), (planted, 1)):
            built = build(FACTS, held_out=held)
            found, told = note(built), {each.metric: each for each in built.bundle.manifest.measurements}
            share = told["false positives, share of held-out tokens"]
            assert (found["held_out"]["false_positives"], share.edited) == (opened, opened / share.n)
            assert [each["false_positives_held_out"] for each in found["edits"]] == [opened, 0, 0]
            assert (found["edits"][0]["highest_cosine_held_out"] > 0.999) == bool(opened)
            likely = told["log-likelihood of held-out text, nats per token"]
            assert (likely.base == likely.edited) == (not opened), "nothing opens, so nothing changes"
        assert note(build(FACTS))["held_out"] is None

    def test_other_prompts_that_open_a_gate_are_named(self, build: Any) -> None:
        """Two that go on behind the prompt of an edit, and not one that is alike; with a wide theta that one too."""
        others = [{"prompt": text} for text in (f"{PROMPT} not", f"{PROMPT}, I say,", "The capital of Italy is")]
        for theta, count in ((0.005, 2), (0.3, 3)):
            built = build(FACTS, others=others, theta=theta)
            told = {each.metric: each for each in built.bundle.manifest.measurements}
            assert told["false positives, share of other prompts"].edited == pytest.approx(count / 3)
            assert note(built)["others_opened"] == [{"prompt": row["prompt"], "opens": [PROMPT]}
                                                    for row in others[:count]]  # fmt: skip

    def test_the_dimension_is_of_the_text_and_the_same_each_time(self, build: Any) -> None:
        one, other = (build(FACTS, sample=300, steps=2, seed=seed) for seed in (0, 1))
        again = build(FACTS, sample=300, steps=2, seed=0, fresh=True)
        assert one.bundle.tensor_bytes == again.bundle.tensor_bytes
        assert note(one) == note(again)
        assert note(one)["dimension"]["pairs"] != note(other)["dimension"]["pairs"], "other tokens"
        assert note(one)["dimension"]["features"] == 300
        found = note(one)
        assert found["bound_for_one_edit"] == pytest.approx((2 ** (-found["editability"] - 1)) ** 0.5)
        assert found["bound_for_all_edits"] == pytest.approx(min(1, 3 * found["bound_for_one_edit"]))


class TestRefused:
    def test_everything_wrong_is_told_before_the_model_is_loaded(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Host, "load", None)
        facts = [
            *FACTS, {"prompt": PROMPT, "answer": " Paris"}, {"prompt": "Hello", "answer": " there"},
            {"prompt": "The end of the road is ", "answer": "near"},
        ]  # fmt: skip
        text = file(tmp_path / "text.jsonl", TEXT[:4])
        with pytest.raises(BundleRefused) as caught:
            stealth.build(tiny_model, file(tmp_path / "facts.jsonl", facts), text, layer=9)
        reasons = {reason.code: reason.message for reason in caught.value.reasons}
        assert set(reasons) == {"layers", "twice", "too_short", "boundary", "too_few_samples"}
        assert PROMPT in reasons["twice"]
        assert "'Hello'" in reasons["too_short"]
        assert "'The end of the road is '" in reasons["boundary"]
        assert FACTS[1]["prompt"] not in "".join(reasons.values()), "negative control"
        short = f"held_out={file(tmp_path / 'held.jsonl', [{'text': 'The'}])}"
        both = f"others={file(tmp_path / 'others.jsonl', [{'prompt': PROMPT}, {'prompt': 'Another one'}])}"
        more = file(tmp_path / "more.jsonl", TEXT)
        with pytest.raises(BundleRefused, match="held_out: expected two texts") as caught:
            stealth.build(tiny_model, file(tmp_path / "facts.jsonl", FACTS), more, short, both)
        assert sorted(reason.code for reason in caught.value.reasons) == ["leak", "too_few_texts"], "all else is right"
        many = [{"prompt": f"The number {each} is", "answer": " odd"} for each in range(513)]
        empty = [{"prompt": PROMPT, "answer": "  "}]
        for rows, code in ((many, "too_many"), (empty, "row")):
            with pytest.raises(BundleRefused) as caught:
                stealth.build(tiny_model, file(tmp_path / "facts.jsonl", rows), text)
            assert code in {reason.code for reason in caught.value.reasons}

    def test_models_without_gate_projections_get_jet_packs_only(self, tiny_model: Path, tmp_path: Path) -> None:
        data = read(Stealth.tables, [file(tmp_path / "facts.jsonl", FACTS), file(tmp_path / "text.jsonl", TEXT)])
        tokenizer, codes = AutoTokenizer.from_pretrained(tiny_model), {}
        for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "Qwen3MoeForCausalLM"):
            inputs = Inputs(data, identify(make_tiny(name, tmp_path / name)), tokenizer)
            codes[name] = [[reason.code for reason in Stealth(form=form).problems(inputs)]
                           for form in ("jetpack", "in-place")]  # fmt: skip
        assert codes == {
            "LlamaForCausalLM": [[], []], "GPT2LMHeadModel": [[], ["site"]],
            "Qwen3MoeForCausalLM": [["site"], ["site"]],
        }  # fmt: skip

    @pytest.mark.parametrize("form", ["jetpack", "in-place"])
    def test_edits_that_open_one_anothers_gates_are_named_together(self, build: Any, form: str) -> None:
        with pytest.raises(BundleRefused) as caught:
            build(CAPITALS, form=form, theta=0.9)
        reasons = caught.value.reasons
        assert {reason.code for reason in reasons} == {"cross_talk"}
        assert len(reasons) == 3, "each pair once"
        assert all(sum(row["prompt"] in reason.message for row in CAPITALS) == 2 for reason in reasons)
        assert build(FACTS, form=form).bundle, "negative control"


class TestNorm:
    NORMS = (
        ("LlamaForCausalLM", "post_attention_layernorm", 0),
        ("Phi3ForCausalLM", "post_attention_layernorm", 0),
        ("Gemma2ForCausalLM", "pre_feedforward_layernorm", 1),
        ("Gemma3ForCausalLM", "pre_feedforward_layernorm", 1),
        ("GPT2LMHeadModel", "ln_2", 0),
    )

    @pytest.mark.parametrize(("name", "module", "more"), NORMS)
    def test_it_is_the_weight_that_the_norm_computes_with(
        self, tmp_path: Path, name: str, module: str, more: float
    ) -> None:
        """Gemma's is 1 + w; LayerNorm has a bias. With it, every vector at mlp.in has length one."""
        model = AutoModelForCausalLM.from_pretrained(make_tiny(name, tmp_path / "model")).requires_grad_(False)
        weight, bias = norm_before(model, 1)
        norm = dict(model.named_modules())[
            f"{'transformer.h' if name == 'GPT2LMHeadModel' else 'model.layers'}.1.{module}"
        ]
        torch.testing.assert_close(weight, norm.weight + more, atol=1e-5, rtol=0)
        torch.testing.assert_close(bias, getattr(norm, "bias", torch.zeros_like(weight)), atol=1e-5, rtol=0)
        assert float((weight - 1).abs().max()) > 0.2, "not all ones"
        seen: list[Tensor] = []
        handle = hook(model, Site(1, "mlp.in"), seen.append)
        model(torch.tensor([[5, 9, 77, 3]]))
        handle.remove()
        x = seen[0][0]
        lengths = ((x - bias) / weight / x.shape[-1] ** 0.5).norm(dim=-1)
        torch.testing.assert_close(lengths, torch.ones(4), atol=1e-3, rtol=0)

    def test_a_model_without_a_norm_there_is_refused(self, tmp_path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(make_tiny("Olmo2ForCausalLM", tmp_path / "model"))
        with pytest.raises(BundleRefused, match="not on a sphere"):
            norm_before(model, 1)
