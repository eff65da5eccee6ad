"""One server's life on a GPU, over HTTP: streams on more variants than slots while versions are swapped and rolled
back; a variant in the weights, exchanged under load and taken out; and a reservation that grows under load.

    python -m tests.gpu.served WAY        where there is a GPU, or the driver that computes nothing

WAY is JSON: {"flags": [of vLLM], "environment": {}, "parts": [names, all without]}.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from loadtests.bench.inputs import edits_everywhere, weakened
from loadtests.harness.client import Answer, complete, stream
from loadtests.harness.growth import until_served
from loadtests.harness.metrics import Scrape
from loadtests.harness.model import MODEL_FOLDER, made_whole
from loadtests.harness.server import Server
from tests.gpu.facts import ended, require, tried
from tests.proofs.parity import random_numbers
from tests.support.tiny_models import make_tiny_llama
from vllm_edits.edit_store import (
    BaseModelRef,
    Bundle,
    EditStore,
    LowRank,
    Offset,
    Provenance,
    Scale,
    Strength,
    identify,
)
from vllm_edits.edit_store.kinds import served_per_request

MODEL = Path(".cache/gpu/served")
VARIANTS, SLOTS, SWAPS, TOKENS = 6, 3, 6, 24
FLAGS = ("--dtype", "bfloat16", "--max-model-len", "512", "--gpu-memory-utilization", "0.3", "--max-num-seqs", "16",
         "--shutdown-timeout", "20")  # fmt: skip
"""Without the last vLLM kills its engines at once, and what they ran of the plugin is not saved."""
MADE = Provenance(tool="rehearsal", method="random")


def model() -> Path:
    if not MODEL.is_dir():
        with made_whole(MODEL) as folder:
            make_tiny_llama(folder, MODEL_FOLDER)
    return MODEL


def variant(name: str, base: BaseModelRef, strength: float) -> Bundle:
    """All kinds at every layer; clients choose how strong."""
    pairs = weakened(edits_everywhere(base, served_per_request()), strength)
    return Bundle.create(name, base, pairs, MADE, strength=Strength(minimum=0, maximum=2))


def linear(name: str, base: BaseModelRef, seed: int) -> Bundle:
    """What can be put into weights."""
    edits: Sequence[Any] = [
        LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=2), Scale(site="layers.2.attn.z"),
        Offset(site="layers.3.mlp.out"),
    ]  # fmt: skip
    return Bundle.create(name, base, [(edit, random_numbers(edit, base, seed)) for edit in edits], MADE)


def edited_server(folder: Path, store: EditStore, way: Mapping[str, Any], **settings: Any) -> Server:
    """A server on this store that reads it only when it is asked to."""
    settings |= {"poll_seconds": 3600, "cache_folder": str(folder / "node")}
    return Server.with_edits(
        model(), store.url, folder / "server.log", *FLAGS, *way.get("flags", ()), settings=settings,
        environment=way.get("environment", {}),
    )  # fmt: skip


def require_complete(answers: Sequence[Answer]) -> None:
    """Wrong if an answer failed, or if there is none."""
    failed = [answer for answer in answers if not answer.complete]
    require(answers and not failed, f"{len(failed)} of {len(answers)} answers failed: {failed[:2]}")


async def under_load(url: str, names: Sequence[str], act: Callable[[], Awaitable[None]]) -> list[Answer]:
    """The answers to clients that never stop asking, while something else is done; some leave in the middle."""
    answers, done = list[Answer](), asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def ask(name: str, number: int) -> None:
            while not done.is_set():
                leave = 3 if number % 4 == 3 else None
                answer = await stream(client, name, "One two three", TOKENS, leave_after=leave, ignore_eos=True)
                if leave is None:
                    answers.append(answer)

        async with asyncio.TaskGroup() as group:
            for number, name in enumerate(names):
                group.create_task(ask(name, number))
            await act()
            done.set()
    return answers


async def moved(url: str, change: Callable[[], Any]) -> str:
    """Change the store and have the server follow; what went wrong."""
    await asyncio.to_thread(change)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        swaps = (await client.post("/v1/edits/sync")).raise_for_status().json()["swaps"]
    await asyncio.sleep(0.5)
    return "".join(swap["error"] or "" for swap in swaps)


def per_request(folder: Path, way: Mapping[str, Any]) -> dict[str, Any]:
    """More variants than slots, swapped and rolled back under load."""
    base, store = identify(model()), EditStore(str(folder / "store"), create=True)
    names = [f"variant-{number}" for number in range(VARIANTS)]
    published = {name: [store.publish(variant(name, base, strength)) for strength in (0.5, 1.0)] for name in names}
    for name, (first, _) in published.items():
        store.promote(f"{name}@{first}")

    async def swap(url: str) -> None:
        for name in names[: SWAPS // 2]:
            second = f"{name}@{published[name][1]}"
            for change in (partial(store.promote, second), partial(store.rollback, name)):
                error = await moved(url, change)
                require(not error, f"a swap of {name}: {error}")

    with edited_server(folder, store, way, slots=SLOTS) as server:
        complete(server.url, names[0], "One", 3, headers={"x-edits-strength": "0.5"})
        answers = asyncio.run(under_load(server.url, [*names, "base", *names], lambda: swap(server.url)))
        metrics = Scrape.of(server.url)
        status = httpx.get(f"{server.url}/v1/edits", timeout=60).raise_for_status().json()
        told = next(line for line in server.log_text().splitlines() if "runner V" in line)
    require_complete(answers)
    versions = {each for both in published.values() for each in both} | {"base"}
    require({answer.version for answer in answers} <= versions, "an answer of no version")
    require(status["last_swap"] and not status["last_swap"]["error"], f"the last swap: {status['last_swap']}")
    lookups = metrics.by("vllm_edits_version_lookups_total", "found")
    require(sum(lookups.values()) > lookups["device",], f"nothing was paged: {lookups}")
    return {
        "runner": told[told.index("runner V") + 7 :][:2], "answers": len(answers),
        "failed": sum(not answer.complete for answer in answers),
        "by variant": dict(Counter(answer.variant for answer in answers)), "swaps": SWAPS,
        "versions found": {found: times for (found,), times in lookups.items()},
        "gate tokens": metrics.sum("vllm_edits_gate_tokens_total"),
    }  # fmt: skip


def in_weights(folder: Path, way: Mapping[str, Any]) -> dict[str, Any]:
    """A variant in the weights: exchanged under load, and taken out, after which the weights are what was loaded."""
    base, store = identify(model()), EditStore(str(folder / "store"), create=True)
    versions = [store.publish(linear("polite", base, seed)) for seed in (1, 2)]
    store.promote(f"polite@{versions[0]}")

    async def exchange(url: str) -> None:
        second = f"polite@{versions[1]}"
        for change in (
            partial(store.promote, second),
            partial(store.rollback, "polite"),
            partial(store.withdraw, "polite"),
        ):
            error = await moved(url, change)
            require(not error, f"the exchange: {error}")

    with edited_server(folder, store, way, weights="polite") as server:
        answers = asyncio.run(under_load(server.url, ["polite"] * 3, lambda: exchange(server.url)))
        held = httpx.get(f"{server.url}/v1/edits", timeout=60).raise_for_status().json()["weights"]
        complete(server.url, "base", "One", 3)
    failed = [answer for answer in answers if not answer.complete and answer.status != httpx.codes.NOT_FOUND]
    require(not failed, f"{len(failed)} of {len(answers)} answers failed: {failed[:2]}")
    require(held["version"] is None and not held["error"], f"the weights hold {held}")
    served = Counter(answer.version[:12] for answer in answers if answer.complete)
    require(set(served) >= {version[:12] for version in versions}, f"answered by {served}")
    return {"answers": sum(served.values()), "failed": len(failed), "versions": len(served)}


def growing(folder: Path, way: Mapping[str, Any]) -> dict[str, Any]:
    """A version that there is no capacity for, promoted under load, and after it one that fits."""
    base, store = identify(model()), EditStore(str(folder / "store"), create=True)
    versions = [store.publish(variant("late", base, strength)) for strength in (0.5, 1.0)]
    growth: dict[str, Any] = {}

    async def grow(url: str) -> None:
        await asyncio.to_thread(store.promote, f"late@{versions[0]}")
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            await client.post("/v1/edits/sync")
            seen = await until_served(client, versions[0], lambda phase: print(phase, flush=True))
        require(not seen.error, f"the growth: {seen.error}")
        growth.update(seen.last)

    with edited_server(folder, store, way, slots=SLOTS) as server:
        answers = asyncio.run(under_load(server.url, ["base"] * 3, lambda: grow(server.url)))
        late = complete(server.url, "late", "One", 3)
        error = asyncio.run(moved(server.url, partial(store.promote, f"late@{versions[1]}")))
        require(not error, f"a swap after the growth: {error}")
        complete(server.url, "late", "One", 3)
    require_complete(answers)
    require({answer.version for answer in answers} == {"base"}, "an answer of no version")
    require(late["headers"]["x-edits-version"] == versions[0], f"answered by {late['headers']['x-edits-version']}")
    return {
        "answers": len(answers), "seconds": growth["seconds"], "worker's pause": growth["longest_pause_seconds"],
        "longest gap of a stream": max(answer.longest_gap for answer in answers),
    }  # fmt: skip


def main() -> None:
    """The command."""
    way = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    worked = []
    for what, part in (("server", per_request), ("server, in the weights", in_weights), ("server, growing", growing)):
        if what not in way.get("parts", [what]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            worked.append(tried(what, lambda: part(Path(folder), way)))  # noqa: B023
    ended(all(worked))


if __name__ == "__main__":
    main()
