"""Steps one after the other, each in processes of its own with a time limit, and the next one whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MARK = "GPU_STEP"
"""names the step in the environment of every process that belongs to it"""
TOO_LONG, GRACE_SECONDS = 124, 8


@dataclass(frozen=True)
class Step:
    """What to run, how long it may take, and what its environment has besides."""

    name: str
    command: Sequence[str]
    """a module, and its arguments"""
    seconds: float = 300
    environment: Mapping[str, str] = field(default_factory=dict)
    covered: bool = True
    """whether a rehearsal notes what it runs of the plugin, which takes time of its own"""


@dataclass(frozen=True)
class Ended:
    """How a step ended."""

    code: int
    seconds: float

    @property
    def result(self) -> str:
        """In a word or two."""
        return "ok" if self.code == 0 else "time was up" if self.code == TOO_LONG else f"failed ({self.code})"


def run(
    step: Step,
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    log: Path,
    results: Path,
    folder: Path = Path(),
) -> Ended:
    """Run a step's command in a folder; what it leaves running is ended. How it ended is added to the results."""
    began = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as written:
        process = subprocess.Popen(
            list(command), stdout=written, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**environment, MARK: step.name, **step.environment}, cwd=folder, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            code = TOO_LONG
            process.terminate()
        _end(step.name)
        process.wait()
    ended = Ended(code, round(time.monotonic() - began, 1))
    with results.open("a") as lines:
        fact = {"what": "step ended", "step": step.name, "code": ended.code, "seconds": ended.seconds}
        lines.write(json.dumps(fact) + "\n")
    return ended


def _end(name: str) -> None:
    """End what a step leaves running, when it had the time to save what it has."""
    deadline = time.monotonic() + GRACE_SECONDS
    while any(_of_step(name)) and time.monotonic() < deadline:
        time.sleep(0.1)
    while left := list(_of_step(name)):
        for each in left:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        time.sleep(0.05)


def _of_step(name: str) -> Iterator[int]:
    """Processes that carry the step's name: engines are process groups of their own."""
    mark = f"{MARK}={name}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)
