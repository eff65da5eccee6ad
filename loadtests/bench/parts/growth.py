"""A growth of the reservation under load: how long it takes, what running streams notice of it, and a restart instead.

A real server starts on a store that promotes nothing, so that nothing is reserved, and answers streams of the base
model without a pause. Then a version with edits of all kinds at every layer is promoted. The first time vLLM's cache is
empty, so that the server compiles the model with these edits. The second server starts on an empty store again and with
the same cache, so that the code is there. At the end that server is stopped, and one starts on the store that promotes
the version: this is how the version would be served if the reservation could not grow.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import httpx

from loadtests.bench.parts.swap import ask
from loadtests.bench.report import Figure, gaps_with_begins, gaps_within, verdict
from loadtests.bench.run import Measured, NotMeasured, Run, require
from loadtests.harness.growth import until_served
from loadtests.harness.load import Question, constant_load
from loadtests.harness.metrics import Scrape
from loadtests.harness.record import gpu
from loadtests.harness.server import Server
from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.kinds import served_per_request

PROMPT = "Tell me about the sea."
BASE, NAME = "base", "grown"
COMPILING, CACHED = "compiling", "code cached"
"""The two growths: the code is compiled, or loaded from vLLM's cache."""
TOKENS = "vllm:generation_tokens_total"
CODE_FILES = "torch_compile_cache/torch_aot_compile/*/*/model"
"""Compiled code in vLLM's cache."""


@dataclass(frozen=True)
class GrowthPlan:
    """What shapes the figures; written beside them."""

    dtype: str
    stream_tokens: Sequence[int] = (200, 232, 264, 296)
    """of each stream; they differ, so that not all streams end at the same step"""
    settled_seconds: float = 3.0
    """before and after what is measured"""
    calm_seconds: float = 20.0
    """of the load before the promotion"""
    target_pause: float | None = 1.0
    """the most seconds that a stream may stand still, with the code cached"""
    target_throughput: float | None = 0.5
    """the least throughput while it compiles, relative to before"""

    @classmethod
    def of(cls, run: Run) -> Self:
        """The targets are for a CPU. On a GPU the CUDA graphs are captured again, and nothing is known yet."""
        calm = 3.0 if run.quick else 20.0
        if gpu():
            return cls(run.dtype, calm_seconds=calm, target_pause=None, target_throughput=None)
        return cls(run.dtype, calm_seconds=calm)


@dataclass(frozen=True)
class TokenCount:
    """The tokens that a server has generated up to a moment."""

    at: float
    tokens: float

    def rate(self, later: TokenCount) -> float:
        """Tokens per second from here to a later count."""
        return (later.tokens - self.tokens) / (later.at - self.at)


@dataclass(frozen=True)
class GrowthTiming:
    """One growth under load, in seconds and tokens per second."""

    first_answer: float
    """from before the promotion to the first answer of the new version"""
    phases: Mapping[str, float]
    """the server's own account of the growth"""
    longest_pause: float
    """the longest time that a worker stood between two steps, by the server's own account"""
    calm_gap: float
    """longest time between two pieces of one stream before the promotion"""
    gap: float
    """the same from the promotion until shortly after the first answer"""
    gap_at: float
    """when that began, after the promotion"""
    calm_rate: float
    """throughput of the load before the promotion"""
    rate: float
    """the same from the promotion to the first answer"""
    compiled: int
    """models that were compiled, or compiled again"""

    @classmethod
    def of(
        cls, token_times: Sequence[Sequence[float]], counts: Sequence[TokenCount], *, answered: float, ended: float,
        last: Mapping[str, Any], compiled: int,
    ) -> Self:  # fmt: skip
        """token_times: of each stream. counts: when the load had settled, before the promotion, and at the answer."""
        settled, promoted, served = counts
        gap, began = max(gaps_with_begins(token_times, promoted.at, ended))
        return cls(
            first_answer=answered - promoted.at, phases=dict(last["seconds"]),
            longest_pause=last["longest_pause_seconds"],
            calm_gap=max(gaps_within(token_times, settled.at, promoted.at)),
            gap=gap, gap_at=began - promoted.at,
            calm_rate=settled.rate(promoted), rate=promoted.rate(served), compiled=compiled,
        )  # fmt: skip

    @property
    def throughput(self) -> float:
        """Throughput while the reservation grows, relative to before."""
        return self.rate / self.calm_rate


@dataclass(frozen=True)
class RestartTiming:
    """A restart instead of a growth, in seconds from the stop of the old server. Nobody is answered meanwhile."""

    stopped: float
    started: float
    first_answer: float


def measure_growth(run: Run) -> Measured:
    """Let two servers grow for the same version, one after the other, and restart the second one."""
    plan = GrowthPlan.of(run)
    inputs = run.inputs.everywhere(served_per_request())
    bundle, folder = inputs.version(NAME, 1), inputs.folder / "growth-store"
    flags = ("--dtype", plan.dtype, "--max-model-len", "512")
    settings = {"poll_seconds": 3600, "cache_folder": str(inputs.node)}
    task = run.progress.add_task("", total=None)
    growths = dict[str, GrowthTiming]()

    def say(*what: str) -> None:
        run.progress.update(task, description=": ".join(what))

    with TemporaryDirectory(prefix="vllm-cache-", ignore_cleanup_errors=True) as cache:

        def server(log: str) -> Server:
            say("starting a server (a first start compiles for minutes)")
            environment = {"VLLM_CACHE_ROOT": cache}
            path = inputs.folder / f"growth-{log}.log"
            return Server.with_edits(inputs.model, folder, path, *flags, settings=settings, environment=environment)

        for growth in (COMPILING, CACHED):
            store = EditStore(str(inputs.store_of(folder.name, [])))
            promotion = Promotion(store, store.publish(bundle), Path(cache), say=partial(say, growth))
            with server(growth.replace(" ", "-")) as running:
                promotion.say("load before the promotion")
                growths[growth] = asyncio.run(promotion.under_load(running.url, plan))
                if growth == COMPILING and not growths[growth].compiled:
                    raise NotMeasured(f"the cache was empty, and no code was compiled into {CODE_FILES}")
                began = time.monotonic()  # the last server's stop begins the restart
            stopped = time.monotonic()
        with server("restart") as running:
            started = time.monotonic()
            answered = asyncio.run(promotion.first_answer(running.url))
    run.progress.remove_task(task)
    restart = RestartTiming(stopped - began, started - began, answered - began)
    samples = {name: asdict(timing) for name, timing in growths.items()} | {"restart": asdict(restart)}
    return Measured(asdict(plan), samples, summarise(plan, growths, restart))


@dataclass(frozen=True)
class Promotion:
    """A published version that is promoted, and the vLLM cache of its server."""

    store: EditStore
    version: str
    cache: Path
    say: Callable[[str], None]

    async def under_load(self, url: str, plan: GrowthPlan) -> GrowthTiming:
        """Promote the version while streams run, and wait for its first answer."""
        looks, code = list[tuple[float, Scrape]](), self._code()

        async def look() -> None:
            scrape = await asyncio.to_thread(Scrape.of, url)
            looks.append((time.monotonic(), scrape))  # parsed afterwards: that takes time from the clients

        questions = [Question(BASE, PROMPT, tokens) for tokens in plan.stream_tokens]
        async with (
            httpx.AsyncClient(base_url=url, timeout=300) as client,
            constant_load(client, questions, ignore_eos=True) as answers,
        ):
            await asyncio.sleep(plan.settled_seconds)
            await look()
            await asyncio.sleep(plan.calm_seconds)
            await look()
            await asyncio.to_thread(self.store.promote, f"{NAME}@{self.version}")
            (await client.post("/v1/edits/sync")).raise_for_status()
            error, last = await until_served(client, self.version, self.say)
            if error or not last:
                raise NotMeasured(error or f"version {self.version[:12]} fitted without a growth")
            answered = await self._answered(client)
            await look()
            await asyncio.sleep(plan.settled_seconds)
            ended = time.monotonic()
        require(answers)
        counts = [TokenCount(at, scrape.sum(TOKENS)) for at, scrape in looks]
        return GrowthTiming.of(
            [answer.token_times for answer in answers], counts, answered=answered, ended=ended, last=last,
            compiled=len(self._code() - code),
        )  # fmt: skip

    async def first_answer(self, url: str) -> float:
        """The moment at which the version has answered, on a server that serves it."""
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            return await self._answered(client)

    async def _answered(self, client: httpx.AsyncClient) -> float:
        answer = await ask(client, NAME, 1)
        if answer.version != self.version:
            raise NotMeasured(f"expected {self.version[:12]} to answer, found {answer.version[:12]}")
        return answer.at

    def _code(self) -> set[tuple[Path, int]]:
        """The compiled code in the cache; a file that is written again counts as another."""
        return {(path, path.stat().st_mtime_ns) for path in self.cache.glob(CODE_FILES)}


def summarise(plan: GrowthPlan, growths: Mapping[str, GrowthTiming], restart: RestartTiming) -> dict[str, Any]:
    """The figures of both growths and the restart, and what was asked for. There is one sample of each."""
    compiling, cached = growths[COMPILING], growths[CACHED]
    return {
        "streams": len(plan.stream_tokens),
        "growths": {
            name: {**asdict(timing), "throughput": timing.throughput} for name, timing in growths.items()
        },
        "restart": asdict(restart),
        "targets": {
            "longest_pause": _held(CACHED, cached.longest_pause, plan.target_pause, at_most=True),
            "gap": _held(CACHED, cached.gap, plan.target_pause, at_most=True),
            "throughput": _held(COMPILING, compiling.throughput, plan.target_throughput),
            "compiled": _held(CACHED, cached.compiled, 0, at_most=True),
        },
    }  # fmt: skip


def _held(growth: str, value: float, target: float | None, *, at_most: bool = False) -> dict[str, Any]:
    word = verdict(Figure.of([value]), target, at_most=at_most)
    return {"growth": growth, "target": target, "at_most": at_most, "verdict": word}
