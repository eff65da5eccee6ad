"""The sides of the benchmark, each a live engine in a process of its own, of which one works at a time."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loadtests.bench.engine import Calls
from loadtests.bench.report import RequestTimes
from loadtests.bench.run import NotMeasured
from loadtests.harness.record import gpu
from loadtests.harness.server import ENVIRONMENT

Progress = Callable[[float], None]
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 27), "MALLOC_TRIM_THRESHOLD_": str(1 << 29)}
"""Has an engine keep what it frees, as with the allocator that vLLM asks for on a CPU.

Otherwise chance decides, for the life of each process, whether the kernel finds pages for activations in every step.
"""


@dataclass(frozen=True)
class Batch:
    """Requests that run together: prompts as token ids, and who answers each (None: the base model)."""

    prompts: Sequence[Sequence[int]]
    names: Sequence[str | None]
    tokens: int
    reads: int = 0
    """bytes of memory that each step reads besides, where steps are taken one by one"""

    def question(self, **how: int) -> dict[str, Any]:
        """What a side is asked to run it."""
        return {"prompts": self.prompts, "names": self.names, "tokens": self.tokens, **how}


@dataclass
class Engine:
    """A vLLM of the benchmark. Use as a context manager."""

    label: str
    arguments: Mapping[str, Any]
    log: Path
    cores: Sequence[int]
    plugins: str = ""
    adapters: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    def start(self, waiting: Progress = lambda _: None) -> Self:
        """Load the model; `waiting` is told the seconds about twice a second."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "loadtests.bench.engine"], env=self._environment(), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._ask({"engine": dict(self.arguments), "adapters": dict(self.adapters)}, waiting)
        return self

    def run(self, batch: Batch) -> list[RequestTimes]:
        """Run a batch to its end."""
        return [RequestTimes(**times) for times in self._ask(batch.question())["requests"]]

    def begin(self, batch: Batch) -> None:
        """Have a batch wait for its first step."""
        self._ask(batch.question(paced=True, reads=batch.reads))

    def step(self) -> Sequence[float] | None:
        """Let the batch that was begun take a step; after its last one, how many seconds each took."""
        return self._ask({}).get("steps")

    def calls(self, batch: Batch) -> Calls:
        """What torch calls while a batch runs; a profiled batch is slow."""
        called = self._ask(batch.question(profile=True))["calls"]
        return {name: (count, taken) for name, (count, taken) in called.items()}

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            **ENVIRONMENT,
            **({} if gpu() else {**KEEP_MEMORY, **self._computing_on_cores()}),
            "VLLM_PLUGINS": self.plugins,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }

    def _computing_on_cores(self) -> dict[str, str]:
        """What vLLM's own server sets for its worker on a CPU, which an engine in one process does not.

        On a GPU the second would bind every thread of every engine to the first core named.
        """
        return {"OMP_NUM_THREADS": str(len(self.cores)), "GOMP_CPU_AFFINITY": " ".join(map(str, self.cores))}

    def _ask(self, question: Mapping[str, Any], waiting: Progress = lambda _: None) -> dict[str, Any]:
        if self.process is None or self.process.stdin is None or self.process.stdout is None:
            raise NotMeasured(f"{self.label} was not started")
        with suppress(BrokenPipeError):  # it has ended: the end of its log says why
            print(json.dumps(question), file=self.process.stdin, flush=True)
        began = time.monotonic()
        while not select.select([self.process.stdout], [], [], 0.5)[0]:
            waiting(time.monotonic() - began)
        line = self.process.stdout.readline()
        if not line:
            end = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
            raise NotMeasured(f"{self.label} ended with code {self.process.wait()}; the end of {self.log}:\n{end}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """Close its input, which ends it; kill it if that takes long."""
        if self.process is None:
            return
        with suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self.process.communicate(timeout=20)
        self.process.kill()
        self.process.wait()
        self.process = None

    def __enter__(self) -> Self:
        return self if self.process is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
