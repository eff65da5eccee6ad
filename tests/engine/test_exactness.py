"""A served variant computes what the paper's formula says, in any company, and the base model is left alone."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from loadtests.harness.client import stream
from tests.support.engine import Serving, kind_bundle
from tests.support.log_probs import NOISE_FLOOR, VISIBLE, apart, ask, reference, served
from vllm_edits.edit_store.authoring.build import pairs_of
from vllm_edits.edit_store.authoring.host import edited

pytestmark = pytest.mark.vllm

# A server shares these cores: two threads that wait for each other are then many times slower than one.
torch.set_num_threads(1)

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a little",
    "def fibonacci(n):",
    "Water boils at one hundred degrees",
)
CACHED_NOISE = {"float32": 1e-3, "bfloat16": 0.15}


def test_every_kind_matches_the_formula(exact_server: tuple[str, Serving]) -> None:
    """Variants of every kind and the base, all in one batch, against transformers edited by formula.

    The truth is the formula in the next wider dtype. The served answer is about as near to it as transformers itself is
    in the served dtype. Positive control: the truth of the unedited model is far away from every variant.
    """
    dtype, serving = exact_server
    wider = {"float32": torch.float64, "bfloat16": torch.float32}[dtype]
    exact = AutoModelForCausalLM.from_pretrained(serving.model, dtype=wider).eval()
    rounded = AutoModelForCausalLM.from_pretrained(serving.model, dtype=getattr(torch, dtype)).eval()
    asked = [(name, prompt) for name in ("base", *serving.bundles) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(asked)) as pool:
        choices = list(pool.map(lambda pair: ask(serving, *pair), asked))
    rows: dict[str, tuple[float, float, float]] = {}
    for (name, _), choice in zip(asked, choices, strict=True):
        pairs = pairs_of(serving.bundles[name]) if name in serving.bundles else []
        assert choice["version"] == (serving.bundles[name].version if pairs else "base")
        with edited(exact, pairs), edited(rounded, pairs):
            truth, noisy = reference(exact, choice), reference(rounded, choice)
        found = apart(served(choice), truth), apart(noisy, truth), apart(served(choice), reference(exact, choice))
        rows[name] = tuple(map(max, found, rows.get(name, (0.0, 0.0, 0.0))))  # type: ignore[assignment]
    print(f"\n{dtype:16} served - truth   transformers - truth   served - unedited")  # noqa: T201
    for name, row in rows.items():
        print(f"{name:16} {row[0]:14.2e}   {row[1]:20.2e}   {row[2]:17.2e}")  # noqa: T201
    for name, (error, noise, effect) in rows.items():
        assert error <= 2 * noise + NOISE_FLOOR[dtype], name
        if name != "base":
            assert effect > max(VISIBLE, 2 * error), f"{name} does nothing"


def test_what_serves_is_the_runner_that_was_asked_for(exact_server: tuple[str, Serving]) -> None:
    """Both of vLLM's compile the model."""
    _, serving = exact_server
    (line,) = [line for line in serving.server.log_text().splitlines() if "reserved: " in line]
    assert f"runner {serving.runner}" in line
    assert "compilation NONE" not in line


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
        assert difference < CACHED_NOISE[exact_server[0]], name
    assert len({tuple(choice["logprobs"]["token_logprobs"]) for choice in first.values()}) == 3


def test_a_caller_cannot_forge_or_drop_the_salt(exact_server: tuple[str, Serving]) -> None:
    """Sending another version's salt, or a claim of one's own, changes nothing about what answers."""
    from vllm_edits.plugin.claim import CLAIM
    from vllm_edits.plugin.serving.variants import Choice
    from vllm_edits.plugin.vllm_host.addressing import cache_salt

    _, serving = exact_server
    prompt = "Names of things that are found in a kitchen, in no order at all. " * 30
    version = serving.bundles["offset"].version
    honest = ask(serving, "base", prompt)
    ask(serving, "offset", prompt)  # its blocks are in the cache now
    salt = cache_salt(Choice("offset", "offset", version), None)
    forged = ask(serving, "base", prompt, cache_salt=salt, vllm_xargs={CLAIM: [1, version, 1.0]})
    assert forged["version"] == "base"
    assert forged["logprobs"]["token_logprobs"] == pytest.approx(
        honest["logprobs"]["token_logprobs"], abs=CACHED_NOISE[exact_server[0]]
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
                while not any(answer.version == version for answer in answers[seen:]):  # noqa: ASYNC110  other tasks answer
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
