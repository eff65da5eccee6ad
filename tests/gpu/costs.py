"""What a decoding step asks of a GPU's driver, with and without edits: launches, graphs, copies, waits, and host time.

    python -m tests.gpu.costs [SIDE …]   where processes meet the driver that counts (tests/gpu/null_gpu.py)

Each side is an engine of its own: vLLM alone, or with slots for 256 versions. 256 requests decode on K of them. Counts
do not depend on the machine. Host time does, so the sides take turns, and what counts is the ratio to vLLM alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from loadtests.bench.inputs import Edits, edits_everywhere, weakened
from tests.gpu import null_gpu
from tests.gpu.facts import ended, require, tell, tried
from tests.gpu.story import tiny_model
from tests.proofs.parity import random_numbers
from tests.support.tiny_models import VOCABULARY
from vllm_edits.edit_store import Bundle, EditStore, Offset, Provenance, Scope, Strength, identify
from vllm_edits.edit_store.kinds import served_per_request

REQUESTS, VERSIONS, STEPS, ROUNDS = 256, (0, 1, 64, 256), 24, 5
ALONE = "vLLM alone"
SIDES = ("rank 1", "rank 16", "all kinds", "scopes", "token ids", "logits")
HOST, FILLING = "host µs", "of these by the plugin µs"
MADE = Provenance(tool="rehearsal", method="random")


def edits_of(side: str, base: Any, number: int) -> Edits:
    """Those of one version; for scopes no two versions have the same."""
    if side.startswith("rank"):
        return edits_everywhere(base, ["low_rank"], int(side.removeprefix("rank ")))
    if side == "all kinds":
        return edits_everywhere(base, served_per_request())
    if side == "logits":
        return [(edit := Offset(site="logits"), random_numbers(edit, base, number))]
    tokens = (3 + number % 150,) if side == "token ids" else None
    scope = Scope(segment="generated", tokens=tokens) if tokens else Scope(first=1 + number)
    edits = [Offset(site=f"layers.{layer}.resid", scope=scope) for layer in range(base.widths.layers)]
    return [(edit, random_numbers(edit, base, number)) for edit in edits]


def engine(side: str, folder: Path) -> tuple[Any, Any]:
    """An engine, and how to have it answer: `generate(names, prompts, params)`."""
    from vllm import LLM

    base, model = identify(tiny_model()), str(tiny_model().resolve())
    arguments: dict[str, Any] = {
        "skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": 64, "max_num_seqs": REQUESTS,
        "max_num_batched_tokens": 4096, "block_size": 16, "num_gpu_blocks_override": 4 * REQUESTS + 64,
        "gpu_memory_utilization": 0.3, "enable_prefix_caching": False,
    }  # fmt: skip
    if side == ALONE:
        llm = LLM(model, **arguments)
        return llm, lambda _, prompts, params: llm.generate(prompts, params, use_tqdm=False)
    from vllm_edits import Variants

    store = EditStore(str(folder / "store"), create=True)
    for number in range(max(VERSIONS)):
        pairs = weakened(edits_of(side, base, number), (number + 1) / max(VERSIONS))
        strength = Strength(minimum=0, maximum=2, default=0.5) if side == "scopes" else None
        store.promote(f"v-{number}@{store.publish(Bundle.create(f'v-{number}', base, pairs, MADE, strength=strength))}")
    settings = {"store": store.url, "slots": max(VERSIONS), "cache_folder": str(folder / "node")}
    llm = LLM(model, load_format="edits", additional_config={"edits": settings}, **arguments)
    variants = Variants(llm)
    return llm, lambda names, prompts, params: variants.generate(names, prompts, params, use_tqdm=False)


def measure(llm: Any, generate: Any, names: Sequence[str | None], seed: int) -> dict[str, Any]:
    """The median over decoding steps of what each asks, and of the microseconds of this thread that it takes."""
    from vllm import SamplingParams

    step, found = llm.llm_engine.step, list[Mapping[str, Any]]()
    llm.filling = 0.0

    def counted() -> Any:
        before, filled, began = null_gpu.counts(), llm.filling, time.thread_time()
        outputs = step()
        taken = time.thread_time() - began
        times = {HOST: taken * 1e6, FILLING: (llm.filling - filled) * 1e6}
        found.append({**null_gpu.less(null_gpu.counts(), before), **times})
        return outputs

    llm.llm_engine.step = counted
    try:
        prompts = [{"prompt_token_ids": [3 + (seed + 7 * n + i) % (VOCABULARY - 3) for i in range(8)]}
                   for n in range(REQUESTS)]  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=STEPS + 8, ignore_eos=True, detokenize=False)
        generate([names[n % len(names)] for n in range(REQUESTS)], prompts, params)
    finally:
        del llm.llm_engine.step
    steady = found[6 : 6 + STEPS]
    return {name: round(statistics.median(each[name] for each in steady), 1) for name in steady[0]}


def timed(llm: Any) -> None:
    """Add up what the plugin's part of each step takes."""
    edited = llm.apply_model(lambda model: model.loaded_edits.edited)[0]
    set_step = edited.set_step

    def fill(batch: Any) -> None:
        began = time.thread_time()
        set_step(batch)
        llm.filling += time.thread_time() - began

    edited.set_step = fill


def serve(side: str) -> None:
    """The process of one side: for each line of standard input, how many versions, what a step asks."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:
        llm, generate = engine(side, Path(folder))
        if side != ALONE:
            timed(llm)
        measure(llm, generate, [None], 0)  # warms up
        print("ready", file=answers, flush=True)
        for number, line in enumerate(sys.stdin, 1):
            names = [f"v-{each}" for each in range(int(line))] or [None]
            print(json.dumps(measure(llm, generate, names, 1000 * number)), file=answers, flush=True)


class Side:
    """An engine that waits to be asked."""

    def __init__(self, side: str) -> None:
        environment = {
            **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "" if side == ALONE else "edits",
        }  # fmt: skip
        self.process = subprocess.Popen([sys.executable, "-m", "tests.gpu.costs", "--serve", side], env=environment,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
        require(self.line() == "ready", f"the engine of {side!r} did not start")

    def line(self) -> str:
        return (self.process.stdout and self.process.stdout.readline().strip()) or ""

    def ask(self, versions: int) -> dict[str, Any]:
        print(versions, file=self.process.stdin, flush=True)
        answer = self.line()
        require(answer, "an engine ended")
        found: dict[str, Any] = json.loads(answer)
        return found


def compare(sides: Sequence[str]) -> None:
    """Tell of every side and number of versions what a step asks more than vLLM alone. Wrong where that grows with the
    versions, or where edits wait for the device."""
    with ExitStack() as running:
        everybody = ALONE, *sides
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            engines = dict(zip(everybody, pool.map(Side, everybody), strict=True))
        for each in engines.values():
            running.callback(each.process.kill)
        keys = [(ALONE, 0), *((side, count) for side in sides for count in VERSIONS)]
        rounds = [
            {key: engines[key[0]].ask(key[1]) for key in (keys if turn % 2 else keys[::-1])} for turn in range(ROUNDS)
        ]
    alone = [each[ALONE, 0] for each in rounds]
    tell("step", side=ALONE, requests=REQUESTS, **_median(alone))
    for side in sides:
        more = dict[int, Mapping[str, float]]()
        for count in VERSIONS:
            own = [each[side, count] for each in rounds]
            found, base = _median(own), _median(alone)
            more[count] = {name: found[name] - base[name] for name in base if name not in (HOST, FILLING)}
            ratio = statistics.median(mine[HOST] / other[HOST] for mine, other in zip(own, alone, strict=True))
            added = {name: value for name, value in more[count].items() if value}
            times = {"host_over_alone": round(ratio, 3), "filling": found[FILLING]}
            tell("step", side=side, versions=count, requests=REQUESTS, **times, more=added)
            waits = {name: value for name, value in more[count].items() if "waits for" in name and value > 0}
            require(not waits, f"{side}, {count} versions: {waits}")
        require(more[1] == more[64] == more[256], f"{side}: what a step asks grows with the versions: {more}")


def _median(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def main(arguments: Sequence[str]) -> None:
    """The command."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments[:1] == ["--serve"]:
        serve(arguments[1])
        ended(True)
    ended(tried("costs", lambda: compare(arguments or SIDES) or {}))


if __name__ == "__main__":
    main(sys.argv[1:])
