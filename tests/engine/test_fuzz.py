"""Batch isolation: whatever runs beside it, whatever is swapped or aborted meanwhile, a request answers as if alone.

A real server on which everything is scarce, and 32 variants of random edits of every kind, at random sites, with random
scopes, some with a strength of the request's own. Requests are random, their order and company up to the machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest

from tests.proofs.parity import cores_apart, every_edit, random_numbers
from tests.support.bundles import base_of, bundle_of
from tests.support.engine import SLOW_ON_TWO, Serving, serve
from tests.support.gpu_ways import ON_V2
from vllm_edits.edit_store import BaseModelRef, Bundle, Scope, Strength
from vllm_edits.edit_store.kinds import served_per_request

pytestmark = pytest.mark.vllm

VARIANTS, SLOTS, AT_ONCE = 32, 12, 24
SCOPES = (
    Scope(), Scope(), Scope(segment="generated"), Scope(segment="prompt"), Scope(first=2), Scope(last=3),
    Scope(tokens=tuple(range(200, 400))),
)  # fmt: skip
WORDS = [
    "sea",
    "hill",
    "road",
    "sand",
    "tree",
    "stone",
    "river",
    "wind",
    "light",
    "house",
    "bird",
    "night",
    "rain",
    "field",
    "boat",
]


def random_bundle(name: str, base: BaseModelRef, seed: int) -> Bundle:
    """One to four edits of random kinds at random sites, at most one of a kind at a site."""
    random = np.random.default_rng(seed)
    by_kind: dict[str, list[Any]] = {}
    for _, (edit, _) in every_edit(base):
        by_kind.setdefault(edit.kind, []).append(edit)
    chosen: dict[tuple[str, str], Any] = {}
    for kind in random.choice(served_per_request(), size=random.integers(1, 5)):
        edit = by_kind[kind][random.integers(len(by_kind[kind]))]
        scope = SCOPES[random.integers(len(SCOPES))]
        chosen[edit.site, edit.kind] = edit.model_copy(update={"scope": scope})
    pairs = [(edit, random_numbers(edit, base, seed + number, 0.2)) for number, edit in enumerate(chosen.values())]
    made = bundle_of(name, base, pairs)
    if seed % 3:
        return made
    bounds = Strength(minimum=-1, maximum=1.5)
    return Bundle(made.manifest.model_copy(update={"strength": bounds}), made.tensor_bytes)


@dataclass(frozen=True)
class Way:
    """How the server is started."""

    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


WAYS = {
    "usual": Way(),
    "V2 runner": Way(environment=ON_V2),
    "two workers": Way(("--tensor-parallel-size", "2")),
    "two engines behind two processes": Way(("--data-parallel-size", "2", "--api-server-count", "2")),
}


@pytest.fixture(scope="module")
def serving(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    base, way = base_of(tiny_model), WAYS[request.param]
    bundles = [random_bundle(f"variant-{number:02}", base, number) for number in range(VARIANTS)]
    flags = ("--dtype", "float32", "--max-model-len", "320", "--max-num-batched-tokens", "96", "--block-size", "32",
             "--num-gpu-blocks-override", "64", "--max-num-seqs", "16", *way.flags)  # fmt: skip
    folder = tmp_path_factory.mktemp("fuzz")
    environment = {"VLLM_CPU_OMP_THREADS_BIND": cores_apart(2)} if way.flags else way.environment
    running = serve(tiny_model, folder, bundles, *flags, settings={"slots": SLOTS}, environment=environment)
    yield running
    running.server.stop()


@dataclass(frozen=True)
class Asked:
    """One request; `model` names a version where it must be that one."""

    model: str
    prompt: str
    tokens: int
    strength: float | None
    patience: float | None = field(compare=False, default=None)
    """seconds after which the client leaves"""


def random_request(random: np.random.Generator, serving: Serving) -> Asked:
    model = "base" if random.random() < 0.2 else f"variant-{random.integers(VARIANTS):02}"
    words = " ".join(random.choice(WORDS, size=int(random.choice([2, 8, 60, 150]))))
    strong = model != "base" and serving.bundles[model].manifest.strength is not None and random.random() < 0.5
    strength = float(random.choice([-1, 0, 0.5, 1.5])) if strong else None
    patience = float(random.uniform(0, 0.5)) if random.random() < 0.1 else None
    return Asked(model, words, int(random.integers(1, 12)), strength, patience)


async def answer(client: httpx.AsyncClient, asked: Asked) -> tuple[str, str] | None:
    """Version and text, or None for a client that left."""
    body = {"model": asked.model, "prompt": asked.prompt, "max_tokens": asked.tokens, "temperature": 0,
            "ignore_eos": True}  # fmt: skip
    headers = {} if asked.strength is None else {"x-edits-strength": str(asked.strength)}
    # Not asyncio's way to leave, which stops httpx while it closes other connections, and some stay open.
    with anyio.move_on_after(asked.patience):
        got = await client.post("/v1/completions", json=body, headers=headers)
        assert got.status_code == 200, got.text
        return got.headers["x-edits-version"], got.json()["choices"][0]["text"]
    return None


async def all_at_once(serving: Serving, requests: list[Asked], swaps: int) -> list[tuple[str, str] | None]:
    """Send all, so many at a time; meanwhile promote other versions of some variants, and roll them back."""
    gate = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=serving.url, timeout=600) as client:

        async def one(asked: Asked) -> tuple[str, str] | None:
            async with gate:
                return await answer(client, asked)

        async def swap() -> None:
            for number in range(swaps):
                name = f"variant-{number % VARIANTS:02}"
                bundle = serving.bundles[name]
                other = Bundle(bundle.manifest.model_copy(update={"label": f"again {number}"}), bundle.tensor_bytes)
                version = await asyncio.to_thread(serving.store.publish, other)
                await asyncio.to_thread(serving.store.promote, f"{name}@{version}")
                (await client.post("/v1/edits/sync")).raise_for_status()
                await asyncio.to_thread(serving.store.rollback, name)
                (await client.post("/v1/edits/sync")).raise_for_status()

        *answers, _ = await asyncio.gather(*map(one, requests), swap())
        return answers


@pytest.mark.parametrize(
    ("serving", "count", "swaps"),
    [
        pytest.param("usual", 120, 4, id="short"),
        pytest.param("usual", 1000, 30, id="long", marks=pytest.mark.slow),
        pytest.param("V2 runner", 120, 4, id="V2 runner", marks=pytest.mark.slow),
        *(pytest.param(way, 120, 4, id=way, marks=SLOW_ON_TWO) for way, how in WAYS.items() if how.flags),
    ],
    indirect=["serving"],
)
def test_every_request_answers_as_it_does_alone(serving: Serving, count: int, swaps: int) -> None:
    random = np.random.default_rng(count)
    requests = [random_request(random, serving) for _ in range(count)]
    together = asyncio.run(all_at_once(serving, requests, swaps))

    async def one_by_one() -> dict[Asked, tuple[str, str] | None]:
        async with httpx.AsyncClient(base_url=serving.url, timeout=600) as client:
            patient = {Asked(each.model, each.prompt, each.tokens, each.strength) for each in requests}
            return {each: await answer(client, each) for each in sorted(patient, key=str)}

    alone = asyncio.run(one_by_one())
    left = 0
    for asked, got in zip(requests, together, strict=True):
        if got is None:
            left += 1
            continue
        expected = alone[Asked(asked.model, asked.prompt, asked.tokens, asked.strength)]
        assert expected is not None
        # A version that was promoted meanwhile has the same numbers under another digest: the text is the same.
        assert got[1] == expected[1], asked
        assert (got[0] == "base") == (asked.model == "base")
    assert 0 < left < count / 4, "positive control: some left, most did not"
    edited = [asked for asked, got in zip(requests, together, strict=True) if got and asked.model != "base"]
    base = asyncio.run(all_at_once(serving, [Asked("base", each.prompt, each.tokens, None) for each in edited], 0))
    differing = sum(
        alone[Asked(each.model, each.prompt, each.tokens, each.strength)][1] != plain[1]  # type: ignore[index]
        for each, plain in zip(edited, base, strict=True)
    )
    assert differing > len(edited) / 2, "positive control: edits change what is said"
    assert serving.status()["slots"]["used"] <= SLOTS
