"""More versions than slots: how often a request finds its version on the device, and what it costs when it does not.

A real server with a thousand variants and 64 slots. First, with nothing else running, single requests for versions that
are on the device and for ones that are not, in turns, and base requests with a prompt of 64 tokens to compare with.
Then traffic whose variants follow Zipf's law, and traffic over twice as many variants as there are slots.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import numpy as np

from loadtests.bench.inputs import FIRST_ORDINARY_TOKEN
from loadtests.bench.report import Figure, verdict
from loadtests.bench.run import Measured, NotMeasured, Run, require
from loadtests.harness.client import stream
from loadtests.harness.metrics import Scrape
from loadtests.harness.server import Server

FOUND = ("device", "host", "store")


@dataclass(frozen=True)
class PagingPlan:
    """What shapes the figures; written beside them."""

    dtype: str
    versions: int = 1000
    slots: int = 64
    single: int = 40
    requests: int = 800
    at_once: int = 8
    zipf: float = 1.1
    tokens: int = 4
    prefill_tokens: int = 64


QUICK = {"versions": 30, "slots": 8, "single": 5, "requests": 60}


def measure_paging(run: Run) -> Measured:
    """Start a server with rank one at every layer in each of its variants, and ask it for them."""
    plan, progress = PagingPlan(run.dtype, **(QUICK if run.quick else {})), run.progress
    inputs = run.inputs.everywhere(["low_rank"])
    task = progress.add_task(f"publishing {plan.versions} versions", total=None)
    names, store = inputs.make_store("paging-store", plan.versions)
    progress.update(task, description="starting a server (a first start compiles for minutes)")
    settings = {"slots": plan.slots, "poll_seconds": 3600, "cache_folder": inputs.node}
    flags = ("--dtype", plan.dtype, "--max-model-len", "512")
    with Server.with_edits(inputs.model, store, inputs.folder / "paging.log", *flags, settings=settings) as server:
        total = 3 * plan.single + 2 * plan.requests
        progress.update(task, description="paging", total=total, completed=0)
        found = asyncio.run(_measure(plan, server.url, names, lambda: progress.advance(task)))
    progress.remove_task(task)
    return Measured(asdict(plan), None, found)


async def _measure(plan: PagingPlan, url: str, names: Sequence[str], done: Callable[[], None]) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        singles = await _single(plan, client, names, done)
        random = np.random.default_rng(0)
        share = 1 / np.arange(1, len(names) + 1) ** plan.zipf
        zipf = random.choice(len(names), plan.requests, p=share / share.sum())
        even = random.integers(0, 2 * plan.slots, plan.requests)
        return {
            "singles": singles,
            "zipf": await _traffic(plan, client, [names[number] for number in zipf], done),
            "twice the slots, evenly": await _traffic(plan, client, [names[number] for number in even], done),
        }


async def _single(
    plan: PagingPlan, client: httpx.AsyncClient, names: Sequence[str], done: Callable[[], None]
) -> dict[str, Any]:
    """Seconds to the first token: a version on the device, one that is not, and a longer prompt of the base model's."""
    seconds: dict[str, list[float]] = {"on the device": [], "paged in": [], "prefill": []}
    absent = iter(names[plan.slots :])  # those beyond the slots are ready in host memory since the start
    for number in range(plan.single):
        paged = await _first_token(client, next(absent), 8, number)
        resident = await _first_token(client, names[0], 8, number)
        prefill = await _first_token(client, "base", 8 + plan.prefill_tokens, number)
        for label, each in (("paged in", paged), ("on the device", resident), ("prefill", prefill)):
            seconds[label].append(each)
            done()
    resident = statistics.median(seconds["on the device"])
    miss, prefill = Figure.of(each - resident for each in seconds["paged in"]), statistics.median(seconds["prefill"])
    return {
        "seconds": {label: asdict(Figure.of(each)) for label, each in seconds.items()},
        "miss": {**asdict(miss), "target": prefill, "verdict": verdict(miss, prefill, at_most=True)},
    }


async def _first_token(client: httpx.AsyncClient, model: str, tokens: int, seed: int) -> float:
    prompt = np.random.default_rng([seed, tokens]).integers(FIRST_ORDINARY_TOKEN, 10_000, tokens).tolist()
    answer = await stream(client, model, prompt, 1, ignore_eos=True)
    require([answer])
    return answer.ended - answer.started


async def _traffic(
    plan: PagingPlan, client: httpx.AsyncClient, asked: Sequence[str], done: Callable[[], None]
) -> dict[str, Any]:
    before = await asyncio.to_thread(Scrape.of, client.base_url)
    turns = asyncio.Semaphore(plan.at_once)

    async def one(number: int, model: str) -> None:
        async with turns:
            prompt = np.random.default_rng(number).integers(FIRST_ORDINARY_TOKEN, 10_000, 8).tolist()
            require([await stream(client, model, prompt, plan.tokens, ignore_eos=True)])
            done()

    async with asyncio.TaskGroup() as group:
        for number, model in enumerate(asked):
            group.create_task(one(number, model))
    after = await asyncio.to_thread(Scrape.of, client.base_url)
    lookups, waited = (
        {found: after.sum(name, found=found) - before.sum(name, found=found) for found in FOUND}
        for name in ("vllm_edits_version_lookups_total", "vllm_edits_page_in_seconds_sum")
    )
    if sum(lookups.values()) != len(asked):
        raise NotMeasured(f"{len(asked)} requests were sent and {lookups} counted")
    waits = {found: waited[found] / lookups[found] for found in FOUND if found != "device" and lookups[found]}
    return {"requests": len(asked), "lookups": lookups, "hit_rate": lookups["device"] / len(asked), "mean_wait": waits}
