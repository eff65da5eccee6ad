"""A served variant computes what the paper's formula says, in any company, and the base model is left alone."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from edit_store import Bundle, check
from edit_store.authoring.host import edited
from loadtests.client import complete, stream
from tests.engine.conftest import Serving, kind_bundle

pytestmark = pytest.mark.vllm

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a little",
    "def fibonacci(n):",
    "Water boils at one hundred degrees",
)
TOKENS = 6
TOP = 5
VISIBLE = 0.05  # a log-probability changed by this much is changed by an edit, not by rounding


def ask(serving: Serving, model: str, prompt: str, **options: Any) -> dict[str, Any]:
    """One answer with the log-probabilities of its tokens and their rivals, by token id."""
    wanted = {"logprobs": TOP, "return_token_ids": True, "return_tokens_as_token_ids": True}
    answer = complete(serving.url, model, prompt, TOKENS, **wanted, **options)
    choice: dict[str, Any] = answer["choices"][0]
    choice["version"] = answer["headers"]["x-edits-version"]
    return choice


def pairs_of(bundle: Bundle) -> list[Any]:
    tensors = check(bundle)
    widths = bundle.manifest.base.widths
    return [
        (edit, {field: tensors[edit.tensor_name(field)] for field in edit.shapes(widths)})
        for edit in bundle.manifest.edits
    ]


@torch.no_grad()
def worst_difference(model: Any, choice: dict[str, Any]) -> float:
    """Largest difference between served and reference log-probabilities, over every generated token and its rivals.

    The reference sees the served text, so the first token compares a prefill and the others compare decode steps.
    """
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    reference = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    worst = 0.0
    for step, rivals in enumerate(choice["logprobs"]["top_logprobs"]):
        row = reference[len(choice["prompt_token_ids"]) - 1 + step]
        for text, logprob in rivals.items():
            token = int(text.removeprefix("token_id:"))
            worst = max(worst, abs(float(row[token]) - logprob))
    return worst


def test_every_kind_matches_the_formula(exact_server: tuple[str, Serving]) -> None:
    """Variants of every kind and the base, all in one batch, against transformers edited by formula.

    float32: equal but for rounding. bfloat16: no further from the reference than the unedited model is from its own.
    Positive control: the reference without the edit is far away. Negative control: the base matches the plain model.
    """
    dtype, serving = exact_server
    model = AutoModelForCausalLM.from_pretrained(serving.model, dtype=getattr(torch, dtype)).eval()
    bundles = serving.bundles
    asked = [(name, prompt) for name in ("base", *bundles) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(asked)) as pool:
        choices = list(pool.map(lambda pair: ask(serving, *pair), asked))
    worst: dict[str, float] = {}
    unedited: dict[str, float] = {}
    for (name, _), choice in zip(asked, choices, strict=True):
        assert choice["version"] == (bundles[name].version if name in bundles else "base")
        with edited(model, pairs_of(bundles[name]) if name in bundles else []):
            worst[name] = max(worst.get(name, 0.0), worst_difference(model, choice))
        unedited[name] = max(unedited.get(name, 0.0), worst_difference(model, choice))
    print(f"\n{dtype}: worst |log p - reference|, then against the unedited reference")
    for name in worst:
        print(f"  {name:16} {worst[name]:.2e}   {unedited[name]:.2e}")
    tolerance = 1e-3 if dtype == "float32" else max(3 * worst["base"], 0.1)
    for name, difference in worst.items():
        assert difference < tolerance, name
        if name != "base":
            assert unedited[name] > max(VISIBLE, 2 * difference), f"{name} does nothing"


def test_a_mixed_batch_equals_solo_runs(exact_server: tuple[str, Serving]) -> None:
    """Every request answers the same alone and among others on other variants; so does the base."""
    dtype, serving = exact_server
    if dtype != "float32":
        pytest.skip("in bfloat16 vLLM's own greedy text differs between batch sizes at near ties")
    names = ["base", *serving.bundles]
    asked = [(name, prompt) for prompt in PROMPTS for name in names]
    solo = [ask(serving, *pair) for pair in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        mixed = list(pool.map(lambda pair: ask(serving, *pair), asked))
    for pair, alone, together in zip(asked, solo, mixed, strict=True):
        assert alone["token_ids"] == together["token_ids"], pair
        assert alone["logprobs"]["token_logprobs"] == pytest.approx(together["logprobs"]["token_logprobs"], abs=2e-4), (
            pair
        )


def test_the_prefix_cache_never_crosses_versions(exact_server: tuple[str, Serving]) -> None:
    """The same long prompt through base and variants in turn gives each its own answer, cached or not.

    Positive control: the second time the cache is hit.
    """
    _, serving = exact_server
    prompt = "A list of rivers, mountains and towns. " * 40
    first = {name: ask(serving, name, prompt) for name in ("base", "offset", "low-rank")}
    hits = serving.metric("vllm:prefix_cache_hits_total")
    again = {name: ask(serving, name, prompt) for name in ("low-rank", "base", "offset")}
    assert serving.metric("vllm:prefix_cache_hits_total") > hits
    for name, choice in first.items():
        difference = max(
            abs(one - two)
            for one, two in zip(
                choice["logprobs"]["token_logprobs"], again[name]["logprobs"]["token_logprobs"], strict=True
            )
        )
        assert difference < (1e-3 if exact_server[0] == "float32" else 0.15), name
    assert len({tuple(choice["logprobs"]["token_logprobs"]) for choice in first.values()}) == 3


def test_a_caller_cannot_forge_or_drop_the_salt(exact_server: tuple[str, Serving]) -> None:
    """Sending another version's salt, or a claim of one's own, changes nothing about what answers."""
    from plugin.claim import CLAIM, cache_salt

    _, serving = exact_server
    prompt = "Names of things that are found in a kitchen, in no order at all. " * 30
    version = serving.bundles["offset"].version
    honest = ask(serving, "base", prompt)
    ask(serving, "offset", prompt)  # its blocks are in the cache now
    salt = cache_salt(version, None)
    forged = ask(serving, "base", prompt, cache_salt=salt, vllm_xargs={CLAIM: [1, version]})
    assert forged["version"] == "base"
    assert forged["logprobs"]["token_logprobs"] == pytest.approx(
        honest["logprobs"]["token_logprobs"], abs=1e-3 if exact_server[0] == "float32" else 0.15
    )


def test_swap_and_rollback_under_streaming_load(exact_server: tuple[str, Serving]) -> None:
    """While streams run, a variant is promoted to a new version and rolled back: no request fails, each is answered by
    one version from its first to its last token, and requests after the switch get the new one.

    The same prompt under the same name before and after the swap is answered by the right version, cache or no cache.
    """
    dtype, serving = exact_server
    name = "low-rank"
    old = serving.store.resolve(name)
    new = serving.store.publish(kind_bundle("low_rank", serving.base, strength=0.2))
    recompiled = serving.server.log_text().count("Warming up model for the compilation")

    async def story() -> tuple[list[Any], list[str]]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=serving.url, timeout=300, limits=limits) as client:
            answers: list[Any] = []
            stop = asyncio.Event()

            async def stream_on(model: str, prompt: str) -> None:
                while not stop.is_set():
                    answers.append(await stream(client, model, prompt, 24))

            async def sync() -> str:
                """Follow the store, and go on when running streams have been answered by what it promotes."""
                (await client.post("/v1/edits/sync")).raise_for_status()
                version = str((await stream(client, name, PROMPTS[0], 4)).version)
                seen = len(answers)
                while not any(answer.version == version for answer in answers[seen:]):
                    await asyncio.sleep(0.1)
                return version

            running = [asyncio.create_task(stream_on(model, prompt)) for model in (name, "base") for prompt in PROMPTS]
            after = []
            for _ in range(2):
                await asyncio.to_thread(serving.store.promote, f"{name}@{new}")
                after.append(await sync())
                await asyncio.to_thread(serving.store.rollback, name)
                after.append(await sync())
            stop.set()
            await asyncio.gather(*running)
            return answers, after

    answers, after = asyncio.run(story())
    assert after == [new, old, new, old]
    assert all(answer.complete for answer in answers), [answer for answer in answers if not answer.complete]
    assert {answer.version for answer in answers if answer.model == name} == {old, new}
    assert {answer.version for answer in answers if answer.model == "base"} == {"base"}
    if dtype == "float32":
        by_version = {version: {a.text for a in answers if a.version == version} for version in (old, new, "base")}
        assert all(len(found) == len(PROMPTS) for found in by_version.values()), by_version
        assert not by_version[old] & by_version[new]
    assert serving.server.log_text().count("Warming up model for the compilation") == recompiled
