"""Start a real `vllm serve` with the plugin on a free port, wait until it answers, stop it by its process id."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Where workers spin on every core, nobody else may run for five seconds, after which a server drops a connection
    # that it believes to be idle, even if the next request is in it already.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
}
START_SECONDS = 600


class ServerFailed(Exception):
    """The server ended before it answered; carries the end of its log."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A running server. Use as a context manager, or `start` and `stop` it."""

    command: Sequence[str]
    log: Path
    port: int
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    def with_edits(
        cls,
        model: Path | str,
        store: Path | str,
        log: Path,
        *flags: str,
        name: str = "base",
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """A server started by `vllm-edits serve`."""
        chosen = [word for key, value in (settings or {}).items() for word in ("--set", f"{key}={value}")]
        start = [_beside_python("vllm-edits"), "serve", str(model), "--store", str(store), *chosen]
        return cls._make(start, log, name, flags, environment)

    @classmethod
    def plain(
        cls, model: Path | str, log: Path, *flags: str, name: str = "base", environment: Mapping[str, str] | None = None
    ) -> Self:
        """vLLM alone."""
        return cls._make([_beside_python("vllm"), "serve", str(model)], log, name, flags, environment)

    @classmethod
    def _make(
        cls, start: list[str], log: Path, name: str, flags: Sequence[str], environment: Mapping[str, str] | None
    ) -> Self:
        port = free_port()
        where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
        return cls([*start, *where, *flags], log, port, {**os.environ, **ENVIRONMENT, **(environment or {})})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, waiting: Callable[[float], None] = lambda _: None) -> Self:
        """Start and wait until it answers; `waiting` is called about once a second. ServerFailed if it ends first."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                list(self.command), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=dict(self.environment), start_new_session=True,
            )  # fmt: skip
        began = time.monotonic()
        while time.monotonic() - began < START_SECONDS:
            if self.process.poll() is not None:
                raise ServerFailed(self._end_of_log())
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=2).status_code == httpx.codes.OK:
                    return self
            waiting(time.monotonic() - began)
            time.sleep(0.5)
        self.stop()
        raise ServerFailed(f"no answer after {START_SECONDS} s\n{self._end_of_log()}")

    def stop(self) -> None:
        """Ask it to end, then end its whole process group."""
        if self.process is None:
            return
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        deadline = time.monotonic() + 10
        while _any_of_group(self.process.pid) and time.monotonic() < deadline:  # engines save what they have
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def _end_of_log(self, lines: int = 40) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def __enter__(self) -> Self:
        return self.start() if self.process is None else self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _any_of_group(group: int) -> bool:
    """Whether a process of a group still runs."""
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


def _beside_python(command: str) -> str:
    return str(Path(sys.executable).with_name(command))
