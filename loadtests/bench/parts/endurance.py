"""A thousand swaps in a row under load: what grows, and whether the last is as fast as the first.

A real server; clients stream without a pause while one variant is moved from version to version. After every swap a
request to the variant must come from the new version. In between the memory that is each process's own (USS), its open
files and its threads are read. Then the same requests go on without swaps: what a step of the engine leaves behind
there (vLLM alone does so too) is not the swaps'.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import psutil

from loadtests.bench.inputs import strengths
from loadtests.bench.parts.swap import ask
from loadtests.bench.report import Figure, verdict
from loadtests.bench.run import Measured, NotMeasured, Run, require
from loadtests.harness.load import Question, constant_load
from loadtests.harness.metrics import Scrape
from loadtests.harness.server import Server
from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.kinds import served_per_request

PROMPT = "Tell me about the sea."
STREAM_TOKENS = 200
QUICK = {"swaps": 40, "calm": 40, "look_every": 2}
SETTLED = 0.2
"""the share of the swaps after which caches are full and growth begins to count"""


@dataclass(frozen=True)
class EndurancePlan:
    """What shapes the figures; written beside them."""

    dtype: str
    swaps: int = 1000
    calm: int = 400
    """rounds of the same requests after the last swap"""
    versions: int = 48
    streams: int = 4
    look_every: int = 10
    target_bytes_per_swap: int = 1024


@dataclass(frozen=True)
class Footprint:
    """What the server's processes hold after so many swaps."""

    swaps: int
    seconds: float
    """from the promotion to the first answer on the new version, median since the last look"""
    memory: Mapping[str, int]
    """bytes that no other process shares, of each process"""
    files: int
    threads: int
    steps: int
    """that the engine has made"""

    @property
    def total(self) -> int:
        """Memory of all processes."""
        return sum(self.memory.values())


def measure_endurance(run: Run) -> Measured:
    """Start a server and swap one of its variants again and again."""
    plan = EndurancePlan(run.dtype, **(QUICK if run.quick else {}))
    inputs = run.inputs.everywhere(served_per_request())
    names, folder = inputs.make_store("endurance-store", plan.streams)
    store = EditStore(str(folder))
    versions = [store.publish(inputs.version(names[0], strength / 2)) for strength in strengths(plan.versions)]
    settings = {"poll_seconds": 3600, "cache_folder": str(inputs.node)}
    flags = ("--dtype", plan.dtype, "--max-model-len", "512")
    task = run.progress.add_task("starting a server (a first start compiles for minutes)", total=None)
    with Server.with_edits(inputs.model, folder, inputs.folder / "endurance.log", *flags, settings=settings) as server:
        run.progress.update(task, description="swapping", total=plan.swaps + plan.calm, completed=0)
        looks = asyncio.run(
            _measure(server, store, names, versions, plan=plan, done=lambda: run.progress.advance(task))
        )
    run.progress.remove_task(task)
    return Measured(asdict(plan), [asdict(look) for look in looks], summarise(plan, looks))


async def _measure(
    server: Server, store: EditStore, names: Sequence[str], versions: Sequence[str], *, plan: EndurancePlan,
    done: Callable[[], None],
) -> list[Footprint]:  # fmt: skip
    """Swap the first of the names again and again, while the others and the base model stream."""
    name, *others = names
    assert server.process is not None  # noqa: S101  it runs
    root, looks, seconds = psutil.Process(server.process.pid), list[Footprint](), list[float]()
    questions = [Question(model, PROMPT, STREAM_TOKENS) for model in ("base", *others)]
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=120) as client,
        constant_load(client, questions, ignore_eos=True) as answers,
    ):
        for number in range(1, plan.swaps + plan.calm + 1):
            version, began = versions[min(number, plan.swaps) % len(versions)], time.monotonic()
            if number <= plan.swaps:
                await asyncio.to_thread(store.promote, f"{name}@{version}")
            (await client.post("/v1/edits/sync")).raise_for_status()
            answer = await ask(client, name, 1)
            seconds.append(answer.at - began)
            if answer.version != version:
                raise NotMeasured(f"swap {number}: expected {version[:12]} to answer, found {answer.version[:12]}")
            require(answers)
            if number % plan.look_every == 0:
                steps = Scrape.of(server.url).sum("vllm:iteration_tokens_total_count")
                looks.append(_look(root, number, statistics.median(seconds), int(steps)))
                seconds.clear()
            done()
    return looks


def _look(root: psutil.Process, swaps: int, seconds: float, steps: int) -> Footprint:
    processes = [root, *root.children(recursive=True)]
    return Footprint(
        swaps, seconds,
        memory={f"{number} {each.name()}": each.memory_full_info().uss for number, each in enumerate(processes)},
        files=sum(each.num_fds() for each in processes),
        threads=sum(each.num_threads() for each in processes),
        steps=steps,
    )  # fmt: skip


def summarise(plan: EndurancePlan, looks: Sequence[Footprint]) -> dict[str, Any]:
    """Growth per swap once everything has settled, and how long the first swaps took and the last.

    memory = a + swaps bytes_per_swap + steps bytes_per_step, the latter from the rounds without swaps
    """
    swapping = [look for look in looks if look.swaps <= plan.swaps]
    calm = [look for look in looks if look.swaps >= plan.swaps]
    settled = [look for look in swapping if look.swaps > SETTLED * plan.swaps]
    swaps, most = [look.swaps for look in settled], plan.target_bytes_per_swap
    step = Figure.of_slope([look.steps for look in calm], [look.total for look in calm])
    memory = Figure.of_slope(swaps, [look.total - step.median * look.steps for look in settled])
    whole = Figure.of_slope(swaps, [look.total for look in settled])
    tenth = max(1, len(swapping) // 10)
    return {
        "swaps": plan.swaps,
        "memory": {
            "at the end": looks[-1].total,
            "bytes_per_swap": {**asdict(memory), "target": most, "verdict": verdict(memory, most, at_most=True)},
            "bytes_per_swap_with_its_steps": asdict(whole),
            "bytes_per_step": asdict(step),
            "bytes_per_swap_by_process": {
                name: Figure.of_slope(swaps, [look.memory.get(name, 0) for look in settled]).median
                for name in settled[-1].memory
            },
        },
        "files_per_swap": asdict(Figure.of_slope(swaps, [look.files for look in settled])),
        "threads_per_swap": asdict(Figure.of_slope(swaps, [look.threads for look in settled])),
        "seconds": {"first tenth": statistics.median(look.seconds for look in swapping[:tenth]),
                    "last tenth": statistics.median(look.seconds for look in swapping[-tenth:])},
    }  # fmt: skip
