"""Swaps under load against a real server: how soon the new version answers, and how long running streams stand still.

Each swap is measured in a window of fixed length, and beside it a calm window with the same requests and no swap, in
alternating order. In both, streams run from before to after, a short request on the variant is in flight at the start
(so in the swap's window the old version's slot is drained too) and one request asks the variant for one token.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from loadtests.bench.inputs import strengths
from loadtests.bench.report import SwapTiming, gaps_within, summarise_swaps
from loadtests.bench.run import Measured, NotMeasured, Run
from loadtests.harness.record import gpu
from loadtests.harness.server import Server
from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.kinds import served_per_request

VARIANTS = 8
SETTLED_TOKENS = 16  # tokens that every stream must have before a window opens
HEAD_START_SECONDS = 0.1
IN_WEIGHTS = ("scale", "low_rank")
PROMPT = "Write down everything you know about the sea, the mountains and the rivers of your country."


@dataclass(frozen=True)
class Answered:
    """Which version answered, and when."""

    version: str
    at: float


@dataclass(frozen=True)
class SwapPlan:
    """What shapes the figures; written beside them.

    The short request is longer than its head start, and a stream than two windows: on a GPU a step takes 2 ms, not 20.
    """

    swaps: int
    dtype: str
    streams: int = 6
    window_seconds: float = 4.0
    short_tokens: int = 16
    stream_tokens: int = 1800

    @classmethod
    def of(cls, run: Run, *, weights: bool) -> SwapPlan:
        """Weights are computed anew before they change, which takes longer."""
        swaps = 3 if run.quick else run.swaps
        if gpu():
            return cls(swaps, run.dtype, window_seconds=2.0 if weights else 1.0, short_tokens=150, stream_tokens=7500)
        return cls(swaps, run.dtype, window_seconds=8.0 if weights else 4.0)

    @property
    def max_model_len(self) -> int:
        """Room for a stream and its prompt."""
        return self.stream_tokens + 248


def measure_swaps(run: Run, *, weights: bool = False) -> Measured:
    """Start a server, and swap one of its variants to a version after another while the base and others stream.

    weights: the variant is in the weights, so that all stream it, and go on when it is swapped
    """
    plan = SwapPlan.of(run, weights=weights)
    progress = run.progress
    inputs = run.inputs.everywhere(IN_WEIGHTS if weights else served_per_request())
    (name, *others), folder = inputs.make_store("swap-store", 1 if weights else VARIANTS)
    store = EditStore(str(folder))
    versions = [store.publish(inputs.version(name, strength / 2)) for strength in strengths(plan.swaps)]
    models = [name] * plan.streams if weights else ["base", *others][: plan.streams]
    flags = ("--dtype", plan.dtype, "--max-model-len", str(plan.max_model_len))
    settings = {"poll_seconds": 3600, "cache_folder": str(inputs.node)}
    settings |= {"weights": name, "weights_running": "keep"} if weights else {}
    server = Server.with_edits(inputs.model, folder, inputs.folder / "server.log", *flags, settings=settings)
    starting = progress.add_task("starting a server (a first start compiles for minutes)", total=None)
    with server:
        progress.remove_task(starting)
        task = progress.add_task("swaps", total=len(versions))
        swaps = asyncio.run(
            _measure(server.url, store, name, versions, models, plan=plan, done=lambda: progress.advance(task))
        )
    progress.remove_task(task)
    return Measured(asdict(plan), [asdict(swap) for swap in swaps], summarise_swaps(swaps))


async def _measure(
    url: str, store: EditStore, name: str, versions: Sequence[str], models: Sequence[str], *, plan: SwapPlan,
    done: Callable[[], None],
) -> list[SwapTiming]:  # fmt: skip
    swaps, window = [], plan.window_seconds
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        for number, version in enumerate(versions):
            async with _streaming(client, models, plan.stream_tokens) as token_times:
                swapped: dict[str, Any] = {}
                for swapping in (True, False) if number % 2 else (False, True):
                    if swapping:
                        begin, swapped = await _swap_window(client, store, name, version, plan)
                        stall = max(gaps_within(token_times, begin, begin + window))
                    else:
                        begin = await _calm_window(client, name, plan)
                        calm = gaps_within(token_times, begin, begin + window)
            swaps.append(SwapTiming(**swapped, stall=stall, calm_stall=max(calm), step=statistics.median(calm)))
            done()
    return swaps


async def _calm_window(client: httpx.AsyncClient, name: str, plan: SwapPlan) -> float:
    window, short = plan.window_seconds, await _in_flight(client, name, plan.short_tokens)
    begin = time.monotonic()
    await ask(client, name, 1)
    await short
    await _until(begin + window, window)
    return begin


async def _swap_window(
    client: httpx.AsyncClient, store: EditStore, name: str, version: str, plan: SwapPlan
) -> tuple[float, dict[str, Any]]:
    """The window's begin, and what was timed of the swap in it."""
    window, short = plan.window_seconds, await _in_flight(client, name, plan.short_tokens)
    begin = time.monotonic()
    await asyncio.to_thread(store.promote, f"{name}@{version}")
    promoted = time.monotonic()
    (await client.post("/v1/edits/sync")).raise_for_status()
    synced = time.monotonic()
    first, before = await ask(client, name, 1), await short
    status = (await client.get("/v1/edits")).raise_for_status().json()
    await _until(begin + window, window)
    if first.version != version or before.version == version:
        raise NotMeasured(
            f"expected the request before the swap on the old version and the one after it on {version[:12]}, found "
            f"{before.version[:12]} and {first.version[:12]}. {status['last_error']}"
        )
    return begin, {
        "promote": promoted - begin,
        "sync": synced - promoted,
        "first_answer": first.at - begin,
        "phases": status["last_swap"]["seconds"],
    }


async def _in_flight(client: httpx.AsyncClient, name: str, tokens: int) -> asyncio.Task[Answered]:
    """A short request that the engine is working on by now."""
    task = asyncio.create_task(ask(client, name, tokens))
    await asyncio.sleep(HEAD_START_SECONDS)
    return task


async def _until(moment: float, window: float) -> None:
    if (left := moment - time.monotonic()) <= 0:
        raise NotMeasured(f"the window of {window} s was over {-left:.1f} s before everything in it had ended")
    await asyncio.sleep(left)


async def ask(client: httpx.AsyncClient, model: str, tokens: int) -> Answered:
    """One request, to its end."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    response = (await client.post("/v1/completions", json=body)).raise_for_status()
    return Answered(response.headers["x-edits-version"], time.monotonic())


@asynccontextmanager
async def _streaming(client: httpx.AsyncClient, models: Sequence[str], tokens: int) -> AsyncIterator[list[list[float]]]:
    """A running stream of each model, and when each of its tokens came. Their end inside the block is an error."""
    token_times: list[list[float]] = [[] for _ in models]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_stream(client, model, tokens, times))
            for model, times in zip(models, token_times, strict=True)
        ]
        while any(len(times) < SETTLED_TOKENS for times in token_times):  # noqa: ASYNC110  the server decides when
            await asyncio.sleep(0.05)
        yield token_times
        for task in tasks:
            task.cancel()


async def _stream(client: httpx.AsyncClient, model: str, tokens: int, token_times: list[float]) -> None:
    """Note when each chunk comes, also one whose text is empty because its token ends inside a character."""
    body = {
        "model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True,
    }  # fmt: skip
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            raise NotMeasured(f"a stream of {model} was answered {response.status_code}: {await response.aread()!r}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                token_times.append(time.monotonic())
                if json.loads(line.removeprefix("data: ")).get("error"):
                    raise NotMeasured(f"a stream of {model} failed: {line}")
    raise NotMeasured(f"a stream of {model} ended inside a window: it needs more than {tokens} tokens")
