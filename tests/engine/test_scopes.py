"""A real server whose variants edit some tokens only, or as strongly as a request asks: exact, and cached rightly."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from loadtests.harness.client import complete
from tests.support.bundles import base_of, bundle_of
from tests.support.engine import USUAL_OR_AS_ON_A_GPU, Serving, serve
from tests.support.scoped import SCOPES, numbered, scoped
from vllm_edits.edit_store import Bundle, Gate, Offset, Scale, Strength
from vllm_edits.edit_store.authoring.formula import FormulaRequest, edited
from vllm_edits.edit_store.authoring.host import Edits
from vllm_edits.edit_store.compose import compose

pytestmark = pytest.mark.vllm
torch.set_num_threads(1)

TOKENS = 8
LONG = "The sea, the hills and the road between them. " * 20
PROMPTS = ("One two three", "Once upon a time there was a little", LONG)
STRENGTH = Strength(minimum=-1, maximum=2, default=0.5)


@pytest.fixture(scope="module", params=USUAL_OR_AS_ON_A_GPU)
def serving(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    """Short steps and little KV cache: long prompts come in chunks, and requests are preempted."""
    base = base_of(tiny_model)
    bundles = scoped(SCOPES, base)
    several = [Scale(site="layers.0.attn.z"), Offset(site="layers.1.resid", scope=SCOPES["prompt"]),
               Offset(site="layers.1.resid", scope=SCOPES["generated"], part=2)]  # fmt: skip
    bundles.append(bundle_of("several", base, numbered(several, base)))
    soft = bundle_of("soft", base, numbered([Offset(site="layers.1.resid"), Scale(site="layers.2.attn.z")], base))
    bundles.append(Bundle(soft.manifest.model_copy(update={"strength": STRENGTH}), soft.tensor_bytes))
    gate = Gate(site="layers.1.mlp.out", reads="layers.1.mlp.in", rank=2)
    bundles.append(bundle_of("gated", base, numbered([gate], base)))
    bundles.append(compose([bundle for bundle in bundles if bundle.manifest.name in {"first", "generated"}]))
    flags = ("--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "96", "--block-size", "32",
             "--num-gpu-blocks-override", "40")  # fmt: skip
    folder, settings = tmp_path_factory.mktemp("scopes"), {"poll_seconds": 1}
    running = serve(tiny_model, folder, bundles, *flags, settings=settings, environment=request.param)
    yield running
    running.server.stop()


def ask(serving: Serving, model: str, prompt: str | list[int], **options: Any) -> dict[str, Any]:
    wanted = {"logprobs": 3, "return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True}
    choice: dict[str, Any] = complete(serving.url, model, prompt, TOKENS, **wanted, **options)["choices"][0]
    return choice


def pairs_of(serving: Serving, name: str) -> Edits:
    from vllm_edits.edit_store.authoring.build import pairs_of as read

    return read(serving.bundles[name])


@torch.no_grad()
def off_by(model: Any, choice: dict[str, Any]) -> float:
    """The largest difference of the log-probabilities that an answer names from what `model` says of them."""
    prompt, answer = choice["prompt_token_ids"], choice["token_ids"]
    said = model(torch.tensor([prompt + answer]), use_cache=False).logits[0].double().log_softmax(-1)
    return max(
        abs(logprob - float(said[len(prompt) - 1 + step, int(token.removeprefix("token_id:"))]))
        for step, rivals in enumerate(choice["logprobs"]["top_logprobs"])
        for token, logprob in rivals.items()
    )


def test_every_scope_is_its_formula_in_one_batch(serving: Serving) -> None:
    """All scopes and a composition, prompts short and long, chunked and preempted, at once; each is felt."""
    exact = AutoModelForCausalLM.from_pretrained(serving.model, dtype=torch.float64).eval()
    asked = [(name, prompt) for prompt in PROMPTS for name in (*SCOPES, "several", "generated+first", "base")]
    with ThreadPoolExecutor(len(asked)) as pool:
        choices = list(pool.map(lambda pair: ask(serving, *pair), asked))
    worst: dict[str, float] = {}
    felt: dict[str, float] = {}
    for (name, _), choice in zip(asked, choices, strict=True):
        prompt = choice["prompt_token_ids"]
        request = FormulaRequest([*prompt, *choice["token_ids"]], len(prompt))
        with edited(exact, pairs_of(serving, name) if name != "base" else [], request=request):
            worst[name] = max(worst.get(name, 0), off_by(exact, choice))
        felt[name] = max(felt.get(name, 0), off_by(exact, choice))
    assert max(worst.values()) < 2e-3, worst
    assert felt.pop("base") < 2e-3
    assert min(felt.values()) > 0.02, felt


def test_what_is_generated_does_not_fork_the_prompts_cache(serving: Serving) -> None:
    """The base model fills the cache; a version for generated tokens finds the whole prompt there, one for all tokens
    nothing. What it generates is found by nobody else: not by the base, not by itself one turn later."""

    def hits() -> float:
        return serving.metric("vllm:prefix_cache_hits_total")

    def fresh(text: str) -> str:
        return text + "Then the road ends, and there is nothing but sand. " * 6

    prompt = fresh("A")
    cold = {name: ask(serving, name, fresh(name)) for name in ("base", "generated", "whole")}
    del cold
    ask(serving, "base", prompt)
    before = hits()
    answer = ask(serving, "generated", prompt)
    shared = hits() - before
    length = len(answer["prompt_token_ids"])
    assert shared >= length - 32 - 1 > 32, "every full block of the prompt"
    before = hits()
    ask(serving, "whole", prompt)
    assert hits() == before
    # One turn later: what was generated under the edits is prompt now, and prompts are not edited.
    turn = [*answer["prompt_token_ids"], *answer["token_ids"], *range(300, 340)]
    exact = AutoModelForCausalLM.from_pretrained(serving.model, dtype=torch.float64).eval()
    for name in ("base", "generated", "base"):
        choice = ask(serving, name, turn)
        request = FormulaRequest([*turn, *choice["token_ids"]], len(turn))
        with edited(exact, pairs_of(serving, name) if name != "base" else [], request=request):
            assert off_by(exact, choice) < 2e-3, name


@pytest.mark.parametrize("how", ["header", "argument"])
def test_strength_is_the_requests_own(serving: Serving, how: str) -> None:
    """The default, weaker, stronger, none and against: each by the formula, all in one batch, cached apart."""
    exact = AutoModelForCausalLM.from_pretrained(serving.model, dtype=torch.float64).eval()

    def soft(strength: float | None) -> dict[str, Any]:
        if strength is None:
            return ask(serving, "soft", LONG)
        if how == "argument":
            return ask(serving, "soft", LONG, vllm_xargs={"edits_strength": strength})
        return ask(serving, "soft", LONG, headers={"x-edits-strength": str(strength)})

    strengths = [None, 0.0, 0.5, 1.0, 2.0, -1.0]
    with ThreadPoolExecutor(len(strengths)) as pool:
        choices = list(pool.map(soft, strengths))
    texts: dict[float | None, tuple[float, ...]] = {}
    for strength, choice in zip(strengths, choices, strict=True):
        with edited(exact, pairs_of(serving, "soft"), strength=STRENGTH.default if strength is None else strength):
            assert off_by(exact, choice) < 2e-3, strength
        texts[strength] = tuple(choice["logprobs"]["token_logprobs"])
    base = ask(serving, "base", LONG)
    assert np.allclose(texts[0.0], base["logprobs"]["token_logprobs"], atol=1e-3)
    assert np.allclose(texts[None], texts[0.5], atol=1e-3)
    assert len({round(sum(text), 2) for text in texts.values()}) == 5, "positive control"


@pytest.mark.parametrize(
    ("model", "strength", "told"),
    [
        ("soft", 2.5, "'soft': expected a strength of -1 to 2, by default 0.5, found 2.5"),
        ("soft", "lots", "expected one number as strength"),
        ("soft", "nan", "expected a strength of -1 to 2"),
        ("whole", 0.5, "accepts no strength"),
        ("base", 0.5, "accepts no strength"),
    ],
)
def test_a_strength_out_of_bounds_is_refused(serving: Serving, model: str, strength: Any, told: str) -> None:
    body = {"model": model, "prompt": "One", "max_tokens": 1}
    for extra, headers in (
        ({"vllm_xargs": {"edits_strength": strength}}, {}),
        ({}, {"x-edits-strength": str(strength)}),
    ):
        answer = httpx.post(f"{serving.url}/v1/completions", json={**body, **extra}, headers=headers, timeout=60)
        assert answer.status_code == 400, answer.text
        assert told in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "edits_strength"


def test_the_firings_of_a_gate_are_counted(serving: Serving) -> None:
    """Prompt tokens and generated ones but the last, whose state is never computed; by the formula's own count."""
    exact = AutoModelForCausalLM.from_pretrained(serving.model, dtype=torch.float64).eval()
    labels = {"variant": "gated", "version": serving.bundles["gated"].version[:12], "edit": "layers.1.mlp.out"}
    of_version = {name: labels[name] for name in ("variant", "version")}
    before = serving.metric("vllm_edits_gate_firings_total", **labels)
    tokens_before = serving.metric("vllm_edits_gate_tokens_total", **of_version)
    choice = ask(serving, "gated", "A gate in a wall")
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    (pair,) = pairs_of(serving, "gated")
    seen: list[torch.Tensor] = []
    handle = exact.get_submodule("model.layers.1.mlp").register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0])
    )
    with torch.no_grad(), edited(exact, [pair]):
        exact(torch.tensor([ids[:-1]]), use_cache=False)
    handle.remove()
    numbers = {name: torch.as_tensor(array).double() for name, array in pair[1].items()}
    fired = int((seen[0] @ numbers["read"].T + numbers["bias"] > 0).sum())
    httpx.post(f"{serving.url}/v1/edits/sync", timeout=60).raise_for_status()
    assert fired > 0
    assert serving.metric("vllm_edits_gate_firings_total", **labels) - before == fired
    assert serving.metric("vllm_edits_gate_tokens_total", **of_version) - tokens_before == len(ids) - 1
