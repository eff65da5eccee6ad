"""Growth of a worker's reservation while it serves: a larger one is made beside the present one, and takes its place.

    building   the slot tensors of the larger reservation are made
    compiling  the model is compiled with them, elsewhere (compiled.py); left out if the code is in vLLM's cache
    loading    the code is loaded
    carrying   the versions in slots are prepared for the new tensors and written into them
    ready      everything that can fail or take time is done

Only the switch stands between two steps: it exchanges the classes of modules and the compiled code, proves that the new
edits are reached, and on a GPU captures the CUDA graphs again. All workers that divide a model take part in each of its
two votes, so all switch at the same step, or none does. Until `finish`, `undo` brings the old state back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from vllm.distributed import get_tp_group

from vllm_edits.edit_store.byte_sizes import sized
from vllm_edits.edit_store.errors import EditsError, InstallRefused, Reason
from vllm_edits.plugin.graph.edited_model import EditedModel, Prepared
from vllm_edits.plugin.graph.host_cache import HostCache
from vllm_edits.plugin.graph.reservation import Reservation
from vllm_edits.plugin.short_turns import in_daemon
from vllm_edits.plugin.vllm_host import compat, compiled
from vllm_edits.plugin.vllm_host.cuda_graphs import capture_again, require_capture_again
from vllm_edits.plugin.vllm_host.device import free_for_growth
from vllm_edits.plugin.vllm_host.loaded import LoadedEdits, reading
from vllm_edits.plugin.vllm_host.proof import require_effective
from vllm_edits.plugin.vllm_host.runner_v2 import require_logits

logger = logging.getLogger("vllm.edits")

Phase = Literal["building", "compiling", "loading", "carrying", "ready"]


@dataclass(frozen=True)
class _Served:
    """The parts that serve: the edits, the cache of versions prepared for them, and the compiled code."""

    edited: EditedModel
    ready: HostCache[Prepared]
    code: Callable[..., Any] | None


class Growth:
    """One growth in this worker. Its methods run in the worker's thread, between two steps, so each is short."""

    def __init__(self, loaded: LoadedEdits, worker: Any, reservation: Reservation, limit_bytes: int | None) -> None:
        """Check the larger reservation, and begin to build it. EditsError or InstallRefused; nothing is changed then.

        worker: vLLM's worker. limit_bytes: device memory that the slots may take; None for all that is free.
        """
        self.phase: Phase = "building"
        self.longest_pause = 0.0
        """the longest time in seconds that this growth stood between two steps"""
        self._loaded, self._worker = loaded, worker
        self._model: Any = worker.model_runner.get_model()
        self._module = compiled.compiled_module(self._model)
        self._config = worker.vllm_config if self._module is None else self._module.vllm_config
        compat.check_reservation(self._config, loaded.base, reservation)
        require_logits(loaded, reservation)
        require_capture_again(worker)
        self._require_memory(reservation, limit_bytes)
        self._grown_config = compiled.with_additional(self._config, loaded.building.additional(reservation))
        self._built: tuple[EditedModel, Callable[[str], Prepared]] | None = None
        """the new edited model, and the function that reads a version and prepares it for this model"""
        self._code: Callable[..., Any] | None = None
        self._compiling: compiled.Compiling | None = None
        self._before: _Served | None = None
        """the parts that served before the switch"""
        self._background = in_daemon(partial(self._build, reservation))

    def _require_memory(self, reservation: Reservation, limit_bytes: int | None) -> None:
        slots, building = self._loaded.edited.slots, self._loaded.building
        needed, free = building.plan(reservation).total(slots), free_for_growth(building.device)
        where = "are free on the device"
        if limit_bytes is not None and limit_bytes < free:
            free, where = limit_bytes, "are allowed by edits.grow_bytes"
        if needed > free:
            raise InstallRefused("a larger reservation", [Reason(
                "memory",
                f"{slots} slots and the base model's take {sized(needed)} beside the present ones, and {sized(free)} "
                f"{where}. Give up slots (edits.slots), entries or profiles of edits.reserve, or memory of the KV "
                "cache (--gpu-memory-utilization, --kv-cache-memory-bytes), and restart",
            )])  # fmt: skip

    # -- before the switch ---------------------------------------------------------------------------------------------

    def _build(self, reservation: Reservation) -> None:
        new = self._loaded.building.make(reservation)
        self._built = new, reading(new.prepare, self._loaded.base, self._loaded.settings)

    def poll(self) -> Phase:
        """Go on to the next phase if the present one is done. Raises the error of a phase that failed."""
        with self._between_steps():
            if self.phase == "compiling":
                if self._compiling is not None and self._compiling.done():
                    self._begin("loading", self._load)
            elif self._background.done():
                self._background.result()
                self._next()
        return self.phase

    def _next(self) -> None:
        if self.phase == "building":
            if self._module is None:
                self._begin("carrying", self._carry)
            elif compiled.code_file(self._module, self._grown_config).is_file():
                self._begin("loading", self._load)
            else:
                self._compile()
        elif self.phase == "loading":
            if self._code is None:  # the file could not be used
                self._compile()
            else:
                self._begin("carrying", self._carry)
        else:
            self.phase = "ready"
            if self._stale():
                self._begin("carrying", self._carry)

    def _begin(self, phase: Phase, work: Callable[[], None]) -> None:
        self.phase, self._background = phase, in_daemon(work)

    def _compile(self) -> None:
        (new, _), device = self._made(), self._loaded.building.device
        call, config = self._loaded.first_call, self._grown_config
        if not compiled.can_fork(device):
            copies = self._loaded.edited.plain_copies(self._model)
            new.attach(copies)
            model, module = copies[self._model], copies[self._module]
            self._compiling = compiled.InThread(partial(compiled.compile_and_save, model, module, config, call, device))
        else:

            def work() -> None:
                self._loaded.edited.detach()
                new.attach()
                compiled.compile_and_save(self._model, self._module, config, call, device)

            self._compiling = compiled.InChild(work)
        self.phase = "compiling"

    def _load(self) -> None:
        try:
            self._code = compiled.load(self._module, self._grown_config)
        except Exception:
            if self._compiling is not None:
                raise
            logger.warning("the compiled code in vLLM's cache cannot be used; compiling it again", exc_info=True)

    def _stale(self) -> dict[int, str]:
        """The versions in slots that are not yet in the new ones."""
        (new, _), held = self._made(), dict(self._loaded.edited.held)
        return {slot: version for slot, version in held.items() if new.held.get(slot) != version}

    def _carry(self) -> None:
        (new, read), old = self._made(), self._loaded.edited
        for slot, version in self._stale().items():
            prepared = read(version)
            if slot in new.held:
                new.clear(slot)
            try:
                new.carry(slot, prepared, old)
            except RuntimeError:
                if old.held.get(slot) == version:
                    raise
                new.clear(slot)  # the old slot was cleared meanwhile

    def _made(self) -> tuple[EditedModel, Callable[[str], Prepared]]:
        if self._built is None:
            raise EditsError("the larger reservation is not built")
        return self._built

    # -- the switch ----------------------------------------------------------------------------------------------------

    def switch(self) -> bool:
        """Let the new reservation serve. False, without a change, if a version in a slot is not carried yet.

        EditsError if it fails on any worker; then the old state serves on all. A repeated call does nothing: it is
        called on all engines again if one of them was not ready.
        """
        if self._before is not None:
            return True
        with self._between_steps():
            new, _ = self._made()
            if self.phase != "ready" or self._stale():
                return False
            self._vote(self._exchange, "exchange the edits")
            self._vote(self._prove, "prove the new edits")
            logger.info("the reservation has grown to %s: %s", sized(new.bytes_reserved), new.reservation)
        return True

    def _vote(self, act: Callable[[], None], what: str) -> None:
        """Do something on all workers that divide the model, or undo the switch on all of them."""
        failure: BaseException | None = None
        try:
            act()
        except Exception as error:  # noqa: BLE001  raised below, when all workers know
            failure = error
        if self._all(failure is None):
            return
        self._restore()
        if failure is None:
            raise EditsError(f"another worker could not {what}; the old state serves")
        raise EditsError(f"could not {what}; the old state serves: {failure!r}") from failure

    def _all(self, well: bool) -> bool:
        if self._loaded.edited.worker.size == 1:
            return well
        votes = torch.tensor([int(well)])
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
        return bool(votes.item())

    def _exchange(self) -> None:
        loaded, (new, read) = self._loaded, self._made()
        old = loaded.edited
        self._before = _Served(old, loaded.ready, None if self._module is None else self._module.aot_compiled_fn)
        new.go_on_from(old)
        old.detach()
        new.attach()
        loaded.edited = new
        loaded.ready = HostCache(read, loaded.settings.host_cache_bytes)
        if self._module is not None:
            self._module.aot_compiled_fn = self._code

    def _prove(self) -> None:
        require_effective(self._model, self._loaded.edited, self._config, self._loaded.building.device)
        capture_again(self._worker)

    def _restore(self) -> None:
        """Let the old edits serve again."""
        before = self._before
        if before is None:
            return
        loaded, (new, _) = self._loaded, self._made()
        old = before.edited
        new.detach()
        old.detach()
        old.attach()
        loaded.edited, loaded.ready = old, before.ready
        if self._module is not None:
            self._module.aot_compiled_fn = before.code
        old.go_on_from(new)
        self._before = None
        capture_again(self._worker)

    # -- after the switch ----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Give back what served before, when all engines have switched."""
        with self._between_steps():
            self._config.additional_config.update(self._grown_config.additional_config)
            if self._module is not None:
                self._module.vllm_config = self._grown_config
            if self._before is not None:
                self._before.edited.release()
            self._before = None
            self._end()

    def undo(self) -> None:
        """Bring back the old state, and stop what runs. It can be called in any phase."""
        with self._between_steps():
            if self._compiling is not None:
                self._compiling.stop()
            self._restore()
            if self._built is not None:
                self._built[0].release()
            self._end()

    def _end(self) -> None:
        self._built = self._code = self._compiling = None
        if self._loaded.building.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.longest_pause = max(self.longest_pause, time.perf_counter() - start)
