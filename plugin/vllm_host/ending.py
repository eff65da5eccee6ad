"""Ends single requests with an error, in the place of the whole engine: those that could be answered by other edits.

A worker finds out just before a step that a request claims what its slot does not hold, and only the scheduler can end
a request; they may be in different processes. So the worker writes the request's id into a file that both have open,
and computes the request with the base model. The scheduler ends the request before it looks at what the step gave, so
no token of it reaches the client. Where no scheduler reads, the step is stopped, and the engine with it.

By the same way the scheduler learns whether the plugin's API side has attached itself to the workers. Before that it
ends every request: whatever front end sent it knows nothing of variants.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edit_store.private_folder import private_folder
from plugin.step_filler import FalseClaim

logger = logging.getLogger("vllm.edits")


_FILE, _ATTACHED, _END = "told", "attached", "end "
_UNATTACHED = (
    "requests end with an error: what sends them is not the plugin's HTTP side, which has not attached itself to this "
    "engine. Start it with `vllm-edits serve` or `vllm serve`, or use plugin.offline.Variants in Python"
)


def _folder(config: Any) -> Path:
    """Where the workers of an engine and its scheduler find each other, while they start."""
    return private_folder(f"{config.instance_id}-{config.parallel_config.data_parallel_index}")


def _open(config: Any) -> int:
    return os.open(_folder(config) / _FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)


class EndsRequests:
    """A worker's side. It is there before the scheduler's."""

    def __init__(self, config: Any) -> None:
        """config: vLLM's, which the scheduler has too."""
        self._config = config
        self._told = _open(config)

    def end(self, request: Any, error: FalseClaim) -> bool:
        """Have a request of vLLM's ended; False where no scheduler reads."""
        if not self._tell(f"{_END}{request.req_id}"):
            return False
        logger.error("request %s ends with an error: %s", request.req_id, error)
        return True

    def attached(self) -> None:
        """The plugin's API side has attached itself. All that meet in the folder have started: leave none behind."""
        self._tell(_ATTACHED)
        shutil.rmtree(_folder(self._config), ignore_errors=True)

    def _tell(self, line: str) -> bool:
        """Write a line, if a scheduler reads: it has written the first. Else the file must stay empty."""
        read = os.fstat(self._told).st_size > 0
        if read:
            os.write(self._told, f"{line}\n".encode())
        return read


class EndedRequests:
    """The scheduler's side."""

    def __init__(self, config: Any) -> None:
        with_workers = (_folder(config) / _FILE).exists()  # on this machine, that is
        self._told = _open(config)
        self._read = os.write(self._told, b"\n")  # a line that says nothing: somebody reads
        self.attached = not with_workers
        """whether requests are known to come from the plugin's API side"""
        shutil.rmtree(_folder(config), ignore_errors=True)

    def end(self, scheduler: Any, step: Iterable[str]) -> dict[int, list[Any]]:
        """End what workers told of since, and while nothing is attached every request of a step; the outputs that say
        so, for each client.

        The cache blocks of such a request bear the hashes of the version that it claims, and do not hold what that
        version computes. They leave the prefix cache, and a request that shares one of them ends too.
        """
        new = os.fstat(self._told).st_size - self._read
        if not new and self.attached:
            return {}
        from vllm.v1.engine import EngineCoreOutput
        from vllm.v1.request import RequestStatus

        lines = os.pread(self._told, new, self._read).decode().split("\n")
        self._read += new
        self.attached = self.attached or _ATTACHED in lines
        ending = {line.removeprefix(_END) for line in lines}
        if not self.attached:
            ending |= set(step)
            logger.error(_UNATTACHED)
        ending &= scheduler.requests.keys()
        blocks = _blocks(scheduler, ending)
        ending |= {request for request in scheduler.requests if not blocks.isdisjoint(_blocks(scheduler, [request]))}
        scheduler.kv_cache_manager.evict_blocks({block for _, block in blocks})
        outputs: dict[int, list[Any]] = {}
        for request in scheduler.finish_requests(ending, RequestStatus.FINISHED_ERROR):
            said = EngineCoreOutput(request.request_id, [], finish_reason=request.get_finished_reason())
            outputs.setdefault(request.client_index, []).append(said)
        return outputs


def _blocks(scheduler: Any, requests: Iterable[str]) -> set[tuple[int, int]]:
    """The cache blocks of requests, each with its group."""
    return {
        (group, block)
        for request in requests
        for group, blocks in enumerate(scheduler.kv_cache_manager.get_block_ids(request))
        for block in blocks
    }
