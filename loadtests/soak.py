"""Correctness under load: `make soak`, or `python -m loadtests.soak --help`.

A real server on an object store, and clients that come whether it keeps up or not. Every version moves the last hidden
state so far towards one token of its own that it says nothing else: so each token of each answer tells which edits it
was computed with. Meanwhile an operator promotes and rolls back, the store stands still for a while, clients leave in
the middle of an answer or read slowly, and more versions are asked for than there are slots.

It must hold: no token of another version than the one in the answer's headers; none of a version that was not promoted
at that time; no request refused that could have been served; and metrics equal to what the clients counted. At the end
the engine's process is killed: what was in flight ends with an error, and a new start serves again.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import httpx
import numpy as np
import psutil
import safetensors.torch
import torch
import typer
from rich.console import Console

from loadtests.bench.inputs import edits_everywhere
from loadtests.harness.client import Answer, stream
from loadtests.harness.metrics import Scrape
from loadtests.harness.model import ensure_model
from loadtests.harness.object_servers import moto
from loadtests.harness.record import about, write
from loadtests.harness.server import Server
from vllm_edits.edit_store import BaseModelRef, Bundle, EditStore, Offset, Provenance, identify
from vllm_edits.edit_store.errors import NotFound

VARIANTS, VERSIONS = 10, 4
POLL_SECONDS = 0.5
LATE_SECONDS = 10.0
"""how long after a promotion the version before may still begin to answer, beside any standstill of the store"""
PROMPT_TOKENS = 12
app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class SoakVersion:
    """A published version, and the token that it says."""

    name: str
    digest: str
    token: int


@dataclass
class SoakPromoted:
    """What a variant's tag named, and since when."""

    version: str
    since: float


@dataclass
class Soak:
    """What happened, as the clients and the operator saw it."""

    versions: Mapping[str, SoakVersion]
    history: dict[str, list[SoakPromoted]]
    base_says: Mapping[int, list[int]] = field(default_factory=dict)
    """by prompt, what the base model answers alone"""
    stalls: list[tuple[float, float]] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    counted: Counter[tuple[str, ...]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    swaps: int = 0
    tokens: int = 0

    def check(self, answer: Answer, asked: str, prompt: int, *, left: bool) -> None:
        """Hold one answer against everything that is known."""
        if answer.status != httpx.codes.OK or answer.error or not (answer.complete or left):
            self.failed.append(f"{asked}: {answer.status} {answer.error or answer.finish}")
            return
        self.ended["left" if left else "answered"] += 1
        self.counted[answer.variant, "" if answer.variant == "base" else answer.version[:12]] += 1
        self.tokens += len(answer.token_ids)
        if asked == "base":
            expected = self.base_says[prompt][: len(answer.token_ids)]
            if (answer.variant, answer.token_ids) != ("base", expected):
                self.wrong.append(f"base, prompt {prompt}: expected {expected}, found {answer}")
            return
        version = self.versions.get(answer.version)
        if version is None or set(answer.token_ids) - {version.token}:
            self.wrong.append(f"{asked}: headers name {answer.version[:12]}, whose token is "
                              f"{version and version.token}; found {answer.token_ids}")  # fmt: skip
        elif not self._could_answer(version, asked, answer):
            self.wrong.append(f"{asked}: {answer.version[:12]} was not promoted then")

    def _could_answer(self, version: SoakVersion, asked: str, answer: Answer) -> bool:
        name, at, digest = asked.partition("@")
        if at:
            return version.digest == digest
        late = LATE_SECONDS + sum(end - begin for begin, end in self.stalls)
        spans = zip(self.history[name], [*self.history[name][1:], SoakPromoted("", float("inf"))], strict=True)
        return any(
            one.version == version.digest and one.since <= answer.ended and answer.started <= after.since + late
            for one, after in spans
        )


@app.command()
def main(
    *,
    seconds: Annotated[float, typer.Option(min=5, help="Time for which clients send requests.")] = 300,
    rate: Annotated[float, typer.Option(min=0.1, help="New clients per second.")] = 8,
    slots: Annotated[
        int, typer.Option(min=2, help="Slots of the server. Fewer than the variants, so versions are paged.")
    ] = 6,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    model: Annotated[Path | None, typer.Option(help="Folder of a checkpoint.", show_default="the demo's model")] = None,
    keep: Annotated[bool, typer.Option("--write/--no-write", help="Write a record to loadtests/results/.")] = True,
) -> None:
    """Load a server with all kinds of requests, and check every answer.

    The command starts a server on an object store. Clients arrive at a fixed
    rate, while versions are promoted, rolled back and paged. The exit code is 1
    if any answer was wrong, failed or was counted wrongly.

    \b
    Example:
      python -m loadtests.soak --seconds 60 --rate 4
    """
    with TemporaryDirectory() as folder, moto(Path(folder)) as environment:
        os.environ.update(environment)
        found = run(
            model or ensure_model(), Path(folder), environment, seconds=seconds, rate=rate, slots=slots, seed=seed
        )
    record = {**about(), "parameters": {"seconds": seconds, "rate": rate, "slots": slots, "seed": seed}, "found": found}
    typer.echo(json.dumps(found, indent=2))
    if keep:
        console.print(f"written: {write(record, kind='soak')}")
    raise typer.Exit(1 if found["wrong"] or found["failed"] or found["miscounted"] else 0)


def run(
    model: Path, folder: Path, environment: Mapping[str, str], *, seconds: float, rate: float, slots: int, seed: int
) -> dict[str, Any]:
    """The whole soak; what is in `wrong`, `failed` and `miscounted` should not be."""
    store = EditStore("s3://edits/soak", create=True)
    base = identify(model)
    versions = publish(store, model, base)
    soak = Soak(versions, {})
    for name, found in by_name(versions).items():
        store.promote(f"{name}@{found[0].digest}")
        soak.history[name] = [SoakPromoted(found[0].digest, 0.0)]
    settings = {"slots": slots, "poll_seconds": POLL_SECONDS, "cache_folder": folder / "node"}
    flags = ("--dtype", "float32", "--max-model-len", "512")
    server = Server.with_edits(
        model, store.url, folder / "server.log", *flags, settings=settings, environment=environment
    )
    console.print("starting a server (a first start compiles for minutes)")
    with server:
        asyncio.run(load(soak, server.url, store, seconds=seconds, rate=rate, seed=seed))
        miscounted = compare_counts(soak, server.url)
        after_kill = asyncio.run(kill_engine(server, versions))
    with server:  # a new start on the same store
        again = asyncio.run(solo(server.url, next(iter(soak.history)), 0, 4))
        served_again = again.complete
    return {
        "requests": dict(soak.ended), "tokens": soak.tokens, "swaps": soak.swaps,
        "standstills of the store": len(soak.stalls), "wrong": soak.wrong, "failed": soak.failed,
        "miscounted": miscounted, "after the engine was killed": {**after_kill, "a new start serves": served_again},
    }  # fmt: skip


# -- what is served ----------------------------------------------------------------------------------------------------


def publish(store: EditStore, model: Path, base: BaseModelRef) -> dict[str, SoakVersion]:
    """Versions that each say one token, with work at every layer besides."""
    weight = output_weight(model)
    tokens = loud_tokens(weight, VARIANTS * VERSIONS)
    beside = edits_everywhere(base, ["low_rank"])
    versions = {}
    for number, token in enumerate(tokens):
        row = weight[token]
        offset = {"vector": (row * (400 / row.dot(row))).numpy().astype(np.float32)}
        name = f"variant-{number % VARIANTS}"
        pairs = [*beside, (Offset(site="final"), offset)]
        bundle = Bundle.create(name, base, pairs, Provenance(tool="loadtests.soak", method="says one token"))
        digest = store.publish(bundle)
        versions[digest] = SoakVersion(name, digest, token)
    return versions


def output_weight(model: Path) -> torch.Tensor:
    """The output head's rows, one for each token; the embeddings where both are one."""
    for path in model.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            for name in ("lm_head.weight", "model.embed_tokens.weight"):
                if name in file.keys():  # noqa: SIM118  no mapping
                    weight: torch.Tensor = file.get_tensor(name).float()
                    return weight
    raise RuntimeError(f"no output head in {model}")


def loud_tokens(weight: torch.Tensor, count: int) -> list[int]:
    """Tokens that a push along their own row makes far more likely than any other."""
    some = torch.arange(len(weight) // 10, len(weight), max(1, len(weight) // 2000))
    scores = weight[some] @ weight.T
    own = scores[torch.arange(len(some)), some]
    scores[torch.arange(len(some)), some] = -float("inf")
    lead = 1 - scores.max(1).values / own
    return [int(token) for token in some[lead.argsort(descending=True)[:count]]]


def by_name(versions: Mapping[str, SoakVersion]) -> dict[str, list[SoakVersion]]:
    """The versions of each variant."""
    found: dict[str, list[SoakVersion]] = {}
    for version in versions.values():
        found.setdefault(version.name, []).append(version)
    return found


# -- the load ----------------------------------------------------------------------------------------------------------


async def load(soak: Soak, url: str, store: EditStore, *, seconds: float, rate: float, seed: int) -> None:
    """Clients and the operator, for so many seconds, and until the last answer has ended."""
    random = np.random.default_rng(seed)
    for prompt in range(3):
        answer = await solo(url, "base", prompt, 24)
        soak.base_says = {**soak.base_says, prompt: answer.token_ids}
        soak.counted["base", ""] += 1
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client, asyncio.TaskGroup() as group:
        group.create_task(operate(soak, store, end, np.random.default_rng(seed + 1)))
        group.create_task(stall(soak, end))
        while time.monotonic() < end:
            group.create_task(one_client(soak, client, int(random.integers(1 << 30))))
            await asyncio.sleep(random.exponential(1 / rate))


async def one_client(soak: Soak, client: httpx.AsyncClient, seed: int) -> None:
    """Ask somebody for something, and perhaps go away or read slowly."""
    random = np.random.default_rng(seed)
    asked, prompt = "base", int(random.integers(3))
    if random.random() > 0.15:
        asked = str(random.choice(list(soak.history)))
        if random.random() < 0.2:
            asked = f"{asked}@{random.choice([each.digest for each in soak.versions.values() if each.name == asked])}"
    leaves = int(random.integers(1, 6)) if random.random() < 0.1 else None
    pause = 0.2 if random.random() < 0.05 else 0.0
    answer = await stream(
        client, asked, prompt_of(prompt), int(random.integers(1, 24)), ignore_eos=True, return_token_ids=True,
        leave_after=leaves, pause=pause,
    )  # fmt: skip
    soak.check(answer, asked, prompt, left=leaves is not None)


async def operate(soak: Soak, store: EditStore, end: float, random: np.random.Generator) -> None:
    """Promote and roll back, one variant after another."""
    while time.monotonic() < end:
        name = str(random.choice(list(soak.history)))
        back = random.random() < 0.3 and len(soak.history[name]) > 1
        if back:
            change = asyncio.to_thread(store.rollback, name)
        else:
            other = random.choice([each.digest for each in soak.versions.values() if each.name == name])
            change = asyncio.to_thread(store.promote, f"{name}@{other}")
        begun = time.monotonic()
        try:
            entry = await change
        except NotFound:
            if not back:
                raise
            continue  # all there was has been rolled back
        if entry.version != soak.history[name][-1].version:
            soak.history[name].append(SoakPromoted(entry.version, begun))
            soak.swaps += 1
        await asyncio.sleep(random.exponential(1.0))


async def stall(soak: Soak, end: float) -> None:
    """Let the object store stand still for a few seconds, now and then."""
    (server,) = (each for each in psutil.Process().children() if "moto.server" in " ".join(each.cmdline()))
    while time.monotonic() + 20 < end:
        await asyncio.sleep(10)
        begin = time.monotonic()
        server.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(4)
        finally:
            server.send_signal(signal.SIGCONT)
        soak.stalls.append((begin, time.monotonic()))


def prompt_of(number: int) -> list[int]:
    """The prompt of that number."""
    return [int(token) for token in np.random.default_rng([7, number]).integers(10, 100, PROMPT_TOKENS)]


async def solo(url: str, model: str, prompt: int, tokens: int) -> Answer:
    """One request of its own."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        return await stream(client, model, prompt_of(prompt), tokens, ignore_eos=True, return_token_ids=True)


# -- afterwards --------------------------------------------------------------------------------------------------------


def compare_counts(soak: Soak, url: str) -> list[str]:
    """Requests by variant and version, as the server counted them and as the clients did."""
    time.sleep(2 * POLL_SECONDS)
    status = httpx.get(f"{url}/v1/edits", timeout=60).json()
    served = Scrape.of(url).by("vllm_edits_requests_total", "variant", "version")
    found = [
        f"{key}: the server counts {served.get(key, 0):.0f}, the clients {soak.counted[key]}"
        for key in {*served, *soak.counted}
        if served.get(key, 0) != soak.counted[key]
    ]
    in_flight = status["base"]["in_flight"] + sum(row["in_flight"] for row in status["variants"])
    return [*found, *([f"{in_flight} requests in flight, and no client is left"] if in_flight else [])]


async def kill_engine(server: Server, versions: Mapping[str, SoakVersion]) -> dict[str, Any]:
    """Kill the engine's process with requests in flight: they end with an error, and so does the server."""
    assert server.process is not None  # noqa: S101  it runs
    name = next(iter(versions.values())).name
    running = [asyncio.create_task(solo(server.url, name, number % 3, 400)) for number in range(4)]
    await asyncio.sleep(1.5)
    for child in psutil.Process(server.process.pid).children(recursive=True):
        if "EngineCore" in " ".join(child.cmdline()) or "EngineCore" in child.name():
            child.kill()
    answers = await asyncio.gather(*running)
    own = {version.token for version in versions.values() if version.name == name}
    return {
        "in flight": len(answers),
        "ended with an error": sum(not answer.complete for answer in answers),
        "tokens of other versions": sum(bool(set(answer.token_ids) - own) for answer in answers),
        "the server ended": await asyncio.to_thread(_ended, server),
    }


def _ended(server: Server) -> bool:
    assert server.process is not None  # noqa: S101
    try:
        server.process.wait(60)
    except Exception:  # noqa: BLE001  reported
        return False
    server.stop()
    return True


if __name__ == "__main__":
    app()
