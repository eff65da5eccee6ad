"""A real server that serves a variant from its weights: compiled, with its prefix cache, under load."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from loadtests.harness.client import Answer, complete, stream
from tests.support.bundles import base_of, bundle_of, random_pairs
from tests.support.engine import Serving, serve
from tests.support.in_weights import PROMPT, TOKENS, linear_bundle, says
from vllm_edits.edit_store import check
from vllm_edits.edit_store.authoring.formula import edited

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def serving(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    base = base_of(tiny_model)
    bundles = [linear_bundle("polite", base, 1), bundle_of("kind", base, random_pairs("offset", 1, base.widths, 9))]
    settings = {"weights": "polite"}
    flags = ("--dtype", "float32", "--max-model-len", "640", "--block-size", "32")
    made = serve(tiny_model, tmp_path_factory.mktemp("weights"), bundles, *flags, settings=settings)
    yield made
    made.server.stop()


def moved(serving: Serving, change: Any) -> dict[str, Any]:
    """Change the store, have the server follow, and say what the swap was."""
    change()
    (swap,) = serving.sync()["swaps"]
    assert not swap["error"]
    return dict(swap)


def refused(serving: Serving, model: str) -> str:
    answer = httpx.post(f"{serving.url}/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1})
    assert answer.status_code == 404
    return str(answer.json()["error"]["message"])


def test_the_variant_is_served_alone_and_the_base_model_returns_bit_for_bit(serving: Serving) -> None:
    """Swapped, withdrawn and brought back; the same prompt each time, so a stale cache block would be seen."""
    first = serving.store.resolve("polite")
    listed = [card["id"] for card in httpx.get(f"{serving.url}/v1/models").json()["data"]]
    assert listed == ["polite"]
    assert serving.status()["weights"] == {"variant": "polite@prod", "version": first, "error": ""}
    for other in ("base", "kind"):
        assert f"version {first[:12]} is in the engine's weights" in refused(serving, other)
    version, one = says(serving, "polite")
    assert version == first
    second = serving.store.publish(linear_bundle("polite", serving.base, 2))
    swap = moved(serving, lambda: serving.store.promote(f"polite@{second}"))
    assert set(swap["seconds"]) == {"fetch", "verify", "stage", "wait", "install", "switch"}
    version, two = says(serving, "polite")
    assert version == second
    moved(serving, lambda: serving.store.withdraw("polite"))
    assert "polite" in refused(serving, "polite")
    base, kind = says(serving, "base"), says(serving, "kind")
    assert len({one, two, base[1], kind[1]}) == 4, "positive control"
    moved(serving, lambda: serving.store.rollback("polite"))
    assert says(serving, "polite") == (second, two)
    moved(serving, lambda: serving.store.rollback("polite"))
    assert says(serving, "polite") == (first, one)
    moved(serving, lambda: serving.store.withdraw("polite"))
    assert (says(serving, "base"), says(serving, "kind")) == (base, kind)
    moved(serving, lambda: serving.store.rollback("polite"))


def test_what_it_says_is_the_formula(serving: Serving) -> None:
    """Compiled, over HTTP: the log-probabilities of the next token, against transformers with the edits as hooks."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    version = serving.store.resolve("polite")
    bundle = serving.store.bundle(version)
    answer = complete(serving.url, "polite", PROMPT, 1, logprobs=5, return_tokens_as_token_ids=True)
    told = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    ids = [int(token.removeprefix("token_id:")) for token in told]
    numbers = {name: np.array(array) for name, array in check(bundle).items()}
    pairs = [(edit, edit.numbers(numbers, serving.base.widths)) for edit in bundle.manifest.edits]
    host = AutoModelForCausalLM.from_pretrained(serving.model, dtype=torch.float64)
    prompt = torch.tensor([AutoTokenizer.from_pretrained(serving.model)(PROMPT)["input_ids"]])
    with torch.no_grad():
        plain = host(prompt).logits[0, -1].log_softmax(-1)[ids]
        with edited(host, pairs):
            truth = host(prompt).logits[0, -1].log_softmax(-1)[ids]
    np.testing.assert_allclose(list(told.values()), truth, atol=1e-4)
    assert (plain - truth).abs().max() > 0.1, "positive control"


@pytest.mark.parametrize("swaps", [24, pytest.param(1000, marks=pytest.mark.slow)])
def test_swaps_and_removals_under_load_end_with_the_weights_as_they_were(serving: Serving, swaps: int) -> None:
    """Clients never stop asking. Every answer is wholly one version's or the base model's, the one that its headers
    name; who asks for what is not served is told so; nothing else fails."""
    moved_to = {}
    versions = [serving.store.publish(linear_bundle("polite", serving.base, seed)) for seed in (1, 2, 3)]
    for version in versions:
        if version != serving.store.resolve("polite"):
            moved(serving, lambda version=version: serving.store.promote(f"polite@{version}"))
        moved_to[version] = says(serving, "polite")[1]
    moved(serving, lambda: serving.store.withdraw("polite"))
    moved_to["base"] = says(serving, "base")[1]
    assert len(set(moved_to.values())) == 4

    answers = asyncio.run(_under_load(serving, versions, swaps))

    served = [answer for answer in answers if answer.status == 200]
    assert len(served) > swaps
    assert {answer.version for answer in served} == set(moved_to)
    for answer in served:
        assert answer.complete, answer
        assert answer.text == moved_to[answer.version]
    for answer in answers:
        if answer.status != 200:
            assert answer.status == 404, answer
            assert "is in the engine's weights" in answer.error or "does not exist" in answer.error
    assert says(serving, "base") == ("base", moved_to["base"])
    moved(serving, lambda: serving.store.rollback("polite"))


async def _under_load(serving: Serving, versions: list[str], swaps: int) -> list[Answer]:
    """Clients ask for the variant and the base model all the time, while the tag goes from version to version."""
    chance, done = random.Random(0), asyncio.Event()
    answers: list[Answer] = []
    async with httpx.AsyncClient(base_url=serving.url, timeout=120) as client:

        async def ask(model: str) -> None:
            while not done.is_set():
                answers.append(await stream(client, model, PROMPT, TOKENS, ignore_eos=True))

        async with asyncio.TaskGroup() as group:
            for model in ("polite", "polite", "base"):
                group.create_task(ask(model))
            promoted = ""
            for _ in range(swaps):
                target = chance.choice([each for each in (*versions, "") if each != promoted])
                if target:
                    await asyncio.to_thread(serving.store.promote, f"polite@{target}")
                else:
                    await asyncio.to_thread(serving.store.withdraw, "polite")
                promoted = target
                answer = await client.post("/v1/edits/sync")
                assert [swap["error"] for swap in answer.json()["swaps"]] == [""]
                await asyncio.sleep(chance.random() * 0.2)
            if promoted:
                await asyncio.to_thread(serving.store.withdraw, "polite")
                await client.post("/v1/edits/sync")
            await asyncio.sleep(1)
            done.set()
    return answers
