"""Ends a single request with a false claim, instead of the whole engine. Runs in the workers and in the scheduler.

A worker notices a false claim just before a step, but only the scheduler can end a request, and it may be in another
process. So the worker writes the request's id into a file that both have open, and computes the request with the base
model. The scheduler ends the request before it reads the results of the step. So no token of it reaches the client. If
no scheduler reads the file, the step fails, and the engine ends.

The same file tells the scheduler that the plugin's API side has attached to the workers. Before that, the scheduler
ends every request, because the front end that sent it does not know variants.
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
"""Attribute of a forked request in the scheduler: number of its first tokens whose blocks are the base model's."""

_FILE, _ATTACHED, _END = "told", "attached", "end "
_STEPS = 3
"""Number of steps for which the scheduler remembers the blocks of freed requests: the steps in flight, and one more."""
_UNATTACHED = (
    "all requests end with an error, because the plugin's HTTP side is not attached to this engine. Start the server "
    "with `vllm-edits serve` or `vllm serve`, or use vllm_edits.Variants in Python"
)


def _name(config: Any) -> str:
    """The name of the folder in which the workers of an engine and its scheduler find each other at start."""
    return f"{config.instance_id}-{config.parallel_config.data_parallel_index}"


def _open(config: Any) -> int:
    return os.open(private_folder(_name(config)) / _FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)


def _leave(config: Any) -> None:
    """Remove the folder. Other processes may remove it at the same time."""
    shutil.rmtree(private_path(_name(config)), ignore_errors=True)


class EndsRequests:
    """The worker's side. It starts before the scheduler's side."""

    def __init__(self, config: Any) -> None:
        """config: vLLM's config, which the scheduler has too."""
        self._config = config
        self._told = _open(config)

    def end(self, request: Any, error: FalseClaim) -> bool:
        """Report a request to the scheduler, which ends it. False if no scheduler reads, or if the report fails."""
        try:
            if not self._tell(_END + json.dumps(request.req_id)):  # a client may choose the id, with any character
                return False
        except OSError as failure:
            logger.error("could not report a request with a false claim to the scheduler; the step fails: %s", failure)  # noqa: TRY400
            return False
        logger.error("request %s ends with an error: %s", request.req_id, error)
        return True

    def attached(self) -> None:
        """Report that the plugin's API side has attached. All processes have started by now, so remove the folder.

        UnsupportedHost if the report fails, because the scheduler would end every request.
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
        """Write a line if a scheduler reads, which has written the first line. Else the file must stay empty.

        OSError if the line could not be written completely.
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
        self._read = os.write(self._told, b"\n")  # an empty line shows the workers that a scheduler reads
        self.attached = not with_workers
        """True if the plugin's API side has attached"""
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
        """End the refused requests and those that workers reported; returns the outputs for each client.

        Before the API side has attached, every request of the step is ended.

        The cache blocks of such a request have the hashes of the claimed version, but not its values. So every request
        that shares one of these blocks ends too, and all their blocks are removed from the prefix cache. This includes
        requests that were aborted or preempted during the step.
        """
        false, self._refused = self._refused | self._news(), set()
        if not self.attached:
            false |= set(step)
            logger.error(_UNATTACHED)
        outputs = self._end(false) if false else {}
        self._freed.append({})
        return outputs

    def _news(self) -> set[str]:
        """The ids in the new complete lines of workers."""
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
        """The cache blocks of a request whose hashes contain its claim.

        Excluded are blocks before its fork, which are the base model's, and the null block, which stands for blocks
        outside a sliding window.
        """
        manager, groups = self._scheduler.kv_cache_manager, self._scheduler.kv_cache_config.kv_cache_groups
        before = getattr(request, BASE_TOKENS, 0)
        ids = {block for group, blocks in zip(groups, manager.get_block_ids(request.request_id), strict=True)
               for block in blocks[before // group.kv_cache_spec.block_size :]}  # fmt: skip
        return ids - {manager.block_pool.null_block.block_id}
