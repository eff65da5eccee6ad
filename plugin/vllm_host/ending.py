"""Ends single requests with an error, in the place of the whole engine: those that could be answered by other edits.

A worker finds out just before a step that a request claims what its slot does not hold, and only the scheduler can end
a request; they may be in different processes. So the worker writes the request's id into a file that both have open,
and computes the request with the base model. The scheduler ends the request before it looks at what the step gave, so
no token of it reaches the client. Where no scheduler reads, the step is stopped, and the engine with it.

By the same way the scheduler learns whether the plugin's API side has attached itself to the workers. Before that it
ends every request: whatever front end sent it knows nothing of variants.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.edit_store.private_folder import private_folder, private_path
from vllm_edits.plugin.claim import FalseClaim

logger = logging.getLogger("vllm.edits")

BASE_TOKENS = "edits_base_tokens"
"""Attribute of a scheduler's request that forks: so many of its first tokens are in blocks of the base model."""

_FILE, _ATTACHED, _END = "told", "attached", "end "
_STEPS = 3
"""For so many steps the scheduler remembers what freed requests held: as many as can be under way, and one."""
_UNATTACHED = (
    "all requests end with an error, because the plugin's HTTP side is not attached to this engine. Start the server "
    "with `vllm-edits serve` or `vllm serve`, or use vllm_edits.Variants in Python"
)


def _name(config: Any) -> str:
    """Of the folder where the workers of an engine and its scheduler find each other, while they start."""
    return f"{config.instance_id}-{config.parallel_config.data_parallel_index}"


def _open(config: Any) -> int:
    return os.open(private_folder(_name(config)) / _FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)


def _leave(config: Any) -> None:
    """Take the folder away. Others may do so at the same time."""
    shutil.rmtree(private_path(_name(config)), ignore_errors=True)


class EndsRequests:
    """A worker's side. It is there before the scheduler's."""

    def __init__(self, config: Any) -> None:
        """config: vLLM's, which the scheduler has too."""
        self._config = config
        self._told = _open(config)

    def end(self, request: Any, error: FalseClaim) -> bool:
        """Have a request of vLLM's ended; False where no scheduler reads, or is told."""
        try:
            if not self._tell(_END + json.dumps(request.req_id)):  # an id can be a client's, and hold any letter
                return False
        except OSError as failure:
            logger.error("could not report a request with a false claim to the scheduler; the step fails: %s", failure)  # noqa: TRY400
            return False
        logger.error("request %s ends with an error: %s", request.req_id, error)
        return True

    def attached(self) -> None:
        """The plugin's API side has attached itself. All that meet in the folder have started: leave none behind.

        UnsupportedHost when the scheduler cannot be told: it would end every request.
        """
        try:
            self._tell(_ATTACHED)
        except OSError as error:
            raise UnsupportedHost(
                f"could not report to the scheduler that the plugin is attached: {error}. Free space in the temporary "
                "folder, or set TMPDIR to another folder"
            ) from error
        _leave(self._config)

    def _tell(self, line: str) -> bool:
        """Write a line, if a scheduler reads: it has written the first. Else the file must stay empty.

        OSError when not all of it could be written.
        """
        read, data = os.fstat(self._told).st_size > 0, f"{line}\n".encode()
        if read and os.write(self._told, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return read


class EndedRequests:
    """The scheduler's side."""

    def __init__(self, config: Any, scheduler: Any) -> None:
        with_workers = (private_path(_name(config)) / _FILE).exists()  # on this machine, that is
        self._told = _open(config)
        self._read = os.write(self._told, b"\n")  # a line that says nothing: somebody reads
        self.attached = not with_workers
        """whether requests are known to come from the plugin's API side"""
        self._scheduler = scheduler
        self._refused = set[str]()
        self._freed = deque[dict[str, set[int]]]([{}], maxlen=_STEPS)
        manager = scheduler.kv_cache_manager
        manager.free = self._noting(manager.free)
        manager.pop_blocks_for_free = self._noting(manager.pop_blocks_for_free)
        _leave(config)

    def refuse(self, request: str, error: FalseClaim) -> None:
        """End a request with the next step."""
        logger.error("request %s ends with an error: %s", request, error)
        self._refused.add(request)

    def end(self, step: Iterable[str]) -> dict[int, list[Any]]:
        """End what was refused, what workers told of since, and while nothing is attached every request of a step; the
        outputs that say so, for each client.

        The cache blocks of such a request bear the hashes of the version that it claims, and do not hold what that
        version computes. Whatever shares one of them ends too, and all their blocks leave the prefix cache, also those
        of requests that a client left, or that had to make way, while the step was under way.
        """
        false, self._refused = self._refused | self._news(), set()
        if not self.attached:
            false |= set(step)
            logger.error(_UNATTACHED)
        outputs = self._end(false) if false else {}
        self._freed.append({})
        return outputs

    def _news(self) -> set[str]:
        """The ids in the whole lines that workers have written since."""
        new = os.fstat(self._told).st_size - self._read
        if not new:
            return set()
        whole = os.pread(self._told, new, self._read).rpartition(b"\n")[0]
        self._read += len(whole) + 1 if whole else 0
        lines = whole.decode().split("\n")
        self.attached = self.attached or _ATTACHED in lines
        return {json.loads(line.removeprefix(_END)) for line in lines if line.startswith(_END)}

    def _end(self, false: set[str]) -> dict[int, list[Any]]:
        from vllm.v1.engine import EngineCoreOutput
        from vllm.v1.request import RequestStatus

        scheduler = self._scheduler
        held: dict[str, set[int]] = {name: self._blocks(request) for name, request in scheduler.requests.items()}
        for freed in self._freed:
            for name, blocks in freed.items():
                held[name] = held.get(name, set()) | blocks
        ending, poisoned = set(false), set[int]()
        found = ending & held.keys()
        while found:
            poisoned = poisoned.union(*(held.pop(name) for name in found))
            ending |= found
            found = {name for name, blocks in held.items() if not blocks.isdisjoint(poisoned)}
        scheduler.kv_cache_manager.evict_blocks(poisoned)
        outputs: dict[int, list[Any]] = {}
        for request in scheduler.finish_requests(ending & scheduler.requests.keys(), RequestStatus.FINISHED_ERROR):
            said = EngineCoreOutput(
                request_id=request.request_id, new_token_ids=[], finish_reason=request.get_finished_reason()
            )
            outputs.setdefault(request.client_index, []).append(said)
        return outputs

    def _noting(self, free: Callable[..., Any]) -> Callable[..., Any]:
        def noted(request: Any, *arguments: Any, **named: Any) -> Any:
            held = self._freed[-1].setdefault(request.request_id, set())
            held |= self._blocks(request)
            return free(request, *arguments, **named)

        return noted

    def _blocks(self, request: Any) -> set[int]:
        """The cache blocks of a request whose hashes say what it claims: not those before its fork, which are the base
        model's and hold what that computes, nor the one that stands for all that is behind a window."""
        manager, groups = self._scheduler.kv_cache_manager, self._scheduler.kv_cache_config.kv_cache_groups
        before = getattr(request, BASE_TOKENS, 0)
        ids = {block for group, blocks in zip(groups, manager.get_block_ids(request.request_id), strict=True)
               for block in blocks[before // group.kv_cache_spec.block_size :]}  # fmt: skip
        return ids - {manager.block_pool.null_block.block_id}
