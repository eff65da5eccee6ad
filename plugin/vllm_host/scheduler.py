"""The scheduler: shares the base model's cache blocks up to the first edited token, and ends false claims.

Start vLLM with `--scheduler-cls vllm_edits.EditsScheduler` (`vllm-edits serve` does this). It is vLLM's own scheduler
with two changes. From the first edited token on, blocks are cached under other hashes. And a request with a false claim
ends alone (ending.py). Without this scheduler all answers are right too; but a version that edits only generated tokens
shares no blocks with the base model, and a false claim ends the engine.
"""

from __future__ import annotations

import functools
import hashlib
import secrets
from pkgutil import resolve_name
from typing import Any

from vllm_edits.plugin.claim import FORK, FalseClaim, Fork
from vllm_edits.plugin.vllm_host.ending import BASE_TOKENS, EndedRequests


def forks(vllm_config: Any) -> bool:
    """True if the engine was started with this scheduler."""
    named = vllm_config.scheduler_config.scheduler_cls
    return (resolve_name(named) if isinstance(named, str) else named) is EditsScheduler


class EditsScheduler:
    """vLLM's scheduler with forks, synchronous or asynchronous as the engine."""

    def __new__(cls, *, vllm_config: Any, **arguments: Any) -> Any:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler

        base = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
        return _forking(base)(vllm_config=vllm_config, **arguments)


@functools.cache
def _forking(base: Any) -> type:
    from vllm.v1.engine import EngineCoreOutputs

    class ForkingScheduler(base):  # type: ignore[misc]
        """Changes the hashes of a forked request when it arrives, and ends requests with false claims."""

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self._hashed = arguments["hash_block_size"] or arguments["block_size"]
            self._ended = EndedRequests(arguments["vllm_config"], self)

        def add_request(self, request: Any) -> None:
            try:
                fork_at_first_edit(request, self._hashed)
            except FalseClaim as error:
                keep_apart(request)
                self._ended.refuse(request.request_id, error)
            super().add_request(request)

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            ended = self._ended.end(scheduler_output.num_scheduled_tokens)
            outputs = super().update_from_output(scheduler_output, model_runner_output)
            for client, said in ended.items():
                told = outputs.setdefault(client, EngineCoreOutputs())
                told.outputs = [*told.outputs, *said]
            return outputs

    return ForkingScheduler


def fork_at_first_edit(request: Any, block_size: int) -> None:
    """Give the blocks of a request their own hashes, from the first block with an edited token on.

    FalseClaim, without any change, if the fork in the request is not [salt, tail].
    """
    arguments = request.sampling_params.extra_args if request.sampling_params is not None else None
    if not arguments or FORK not in arguments:
        return
    told = Fork.of(arguments[FORK])
    fork = max(0, request.num_prompt_tokens - told.tail) // block_size
    _fork(request, fork, told.salt)
    setattr(request, BASE_TOKENS, fork * block_size)


def keep_apart(request: Any) -> None:
    """Give all blocks of a request unique hashes."""
    _fork(request, 0, secrets.token_hex(16))


def _fork(request: Any, fork: int, salt: str) -> None:
    """Give the blocks of a request other hashes from block number `fork` on."""
    hasher = request._block_hasher  # noqa: SLF001  vLLM has no public name for it
    if hasher is None:
        return

    def forking(request: Any) -> list[bytes]:
        done = len(request.block_hashes)
        new: list[bytes] = hasher(request)
        if not done <= fork < done + len(new):
            return new
        # The chain continues from the fork's own hash, as if the salt were part of the block.
        kept = [*new[: fork - done], hashlib.sha256(new[fork - done] + salt.encode()).digest()]
        request.block_hashes.extend(kept)
        try:
            return [*kept, *hasher(request)]
        finally:
            del request.block_hashes[done:]

    request._block_hasher = forking  # noqa: SLF001
    request.block_hashes.clear()
    request.update_block_hashes()
