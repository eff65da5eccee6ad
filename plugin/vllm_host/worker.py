"""The methods of a worker that the API process calls by name: attach, stage, install, clear, grow, and others.

vLLM runs them between two steps of the engine, so each must be short. Reading and checking a version takes longer, so
it runs in the background (host_cache.py). Every answer is plain data. A refusal is an answer too, so it does not end
the worker.
"""

from __future__ import annotations

import traceback
from typing import Any

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.errors import BundleRefused, EditsError
from vllm_edits.plugin.graph.reservation import Reservation
from vllm_edits.plugin.vllm_host import runner_v1
from vllm_edits.plugin.vllm_host.growth import Growth
from vllm_edits.plugin.vllm_host.loaded import LoadedEdits, edits_of
from vllm_edits.server_config.settings import Reserve

WorkerAnswer = dict[str, Any]


class EditsWorker:
    """Methods for vLLM's worker class, added as `--worker-extension-cls` does. It has no state."""

    @classmethod
    def extend(cls, worker_class: type) -> None:
        """Add these methods to the worker class once, in the way of vLLM's worker extensions."""
        if not issubclass(worker_class, cls):
            worker_class.__bases__ = (*worker_class.__bases__, cls)

    def _edits(self) -> LoadedEdits:
        return edits_of(self.model_runner.get_model())  # type: ignore[attr-defined]

    def edits_attach(self) -> WorkerAnswer:
        """Start to fill token slots from the runner's batches, and describe the worker's reservation."""
        return _answer(self._attach)

    def _attach(self) -> WorkerAnswer:
        loaded, runner = self._edits(), self.model_runner  # type: ignore[attr-defined]
        loaded.ending.attached()
        if loaded.runner == "V1":
            runner_v1.attach(runner, loaded)
        return {
            "base": loaded.base.model_dump(mode="json"),
            "reserve": loaded.edited.reservation.to_settings(),
            "scopes": loaded.edited.reservation.scopes,
            "slots": loaded.edited.slots,
            "bytes": loaded.edited.bytes_reserved,
            "dtype": str(loaded.edited.dtype).removeprefix("torch."),
            "runner": loaded.runner,
            "workers": loaded.edited.worker.size,
            "weights": {
                "sites": len(loaded.weights.parts),
                "bytes": loaded.weights.bytes_touched,
                "version": loaded.weights.version,
                "epoch": loaded.weights.epoch,
            },
        }

    def edits_grow(self, reserve: list[dict[str, Any]], scopes: int, limit_bytes: int | None) -> WorkerAnswer:
        """Begin to make a larger reservation, given as settings. Answers nothing, or a refusal, without a change."""

        def grow() -> WorkerAnswer:
            loaded = self._edits()
            base, entries = loaded.base, [Reserve(**item) for item in reserve]
            reservation = Reservation.from_settings(entries, supported(base.architecture), base.widths, scopes)
            if loaded.growth is not None:
                loaded.growth.undo()
            loaded.growth = Growth(loaded, self, reservation, limit_bytes)
            return {}

        return _answer(grow)

    def edits_grow_poll(self) -> WorkerAnswer:
        """Go on with the growth. Answers its phase, and the longest time that it stood between two steps."""
        return _answer(lambda: {"phase": self._growth().poll(), "pause": self._growth().longest_pause})

    def edits_grow_switch(self) -> WorkerAnswer:
        """Let the larger reservation serve. {'absent': True}, without a change, if not all versions are carried."""

        def switch() -> WorkerAnswer:
            growth = self._growth()
            switched = growth.switch()
            return {"pause": growth.longest_pause} if switched else {"absent": True}

        return _answer(switch)

    def edits_grow_end(self, keep: bool) -> WorkerAnswer:
        """End the growth: keep what it made, or bring back what was there before. A repeated call does nothing."""

        def end() -> WorkerAnswer:
            loaded = self._edits()
            growth, loaded.growth = loaded.growth, None
            if growth is None:
                return {"pause": 0.0, "bytes": loaded.edited.bytes_reserved}
            growth.finish() if keep else growth.undo()
            return {"pause": growth.longest_pause, "bytes": loaded.edited.bytes_reserved}

        return _answer(end)

    def _growth(self) -> Growth:
        growth: Growth | None = self._edits().growth
        if growth is None:
            raise EditsError("no larger reservation is being made")
        return growth

    def edits_stage(self, version: str) -> WorkerAnswer:
        """Start to read, check and convert a version in the background."""
        self._edits().ready.stage(version)
        return {}

    def edits_staged(self, version: str) -> WorkerAnswer:
        """{'pending': True}, or {} if the version is ready to install, or its refusal."""
        return _answer(lambda: {} if self._edits().ready.poll(version) else {"pending": True})

    def edits_install(self, slot: int, version: str, evicted: str | None) -> WorkerAnswer:
        """Write a staged version into a slot, in place of the version `evicted`, if any.

        Answers the digest of the slot, the worker's rank, and the last firings of the version that left; or
        {'absent': True}, without a change, if the version is not ready here any more. A repeated call gives the same
        answer.
        """

        def install() -> WorkerAnswer:
            loaded = self._edits()
            edited, prepared = loaded.edited, loaded.ready.get(version)
            rank = edited.worker.rank
            if edited.held.get(slot) == version:
                return {"digest": edited.digest(slot), "rank": rank, "firings": []}
            if prepared is None:
                return {"absent": True}
            firings = edited.firings(slot)
            if evicted is not None:
                edited.clear(slot)
            return {"digest": edited.install(slot, prepared), "rank": rank, "firings": firings}

        return _answer(install)

    def edits_stage_weights(self, version: str) -> WorkerAnswer:
        """Start to read and check a version, and to compute the weights with its edits, in the background."""
        self._edits().patches.stage(version)
        return {}

    def edits_weights_staged(self, version: str) -> WorkerAnswer:
        """{'pending': True}, or {} if the version is ready to be put into the weights, or its refusal."""
        return _answer(lambda: {} if self._edits().patches.poll(version) else {"pending": True})

    def edits_put_weights(self, version: str | None, epoch: int, keep_running: bool) -> WorkerAnswer:
        """Put a staged version into the weights, or with None the loaded model. After a failure, nothing has changed.

        keep_running: requests that were computed with other weights may continue. Answers the digest of the weights, or
        {'absent': True}, without a change, if the version is not ready here. A repeated call gives the same answer.
        """

        def put() -> WorkerAnswer:
            loaded = self._edits()
            weights, patch = loaded.weights, None
            if weights.version != version:
                if version is not None:
                    patch = weights.known(version) or loaded.patches.get(version)
                    if patch is None:
                        return {"absent": True}
                weights.install(patch, epoch)
                loaded.edited.weights_hold(version, keep_running=keep_running)
            return {"digest": weights.digest, "rank": loaded.edited.worker.rank}

        return _answer(put)

    def edits_fence(self) -> WorkerAnswer:
        """Do nothing. Calls are answered in order, so the engine has then seen all earlier calls of the process."""
        return {}

    def edits_firings(self) -> WorkerAnswer:
        """The counters of the gates on the device since their install: [version, tokens, firings by edit] of each."""

        def firings() -> WorkerAnswer:
            edited = self._edits().edited
            return {"rank": edited.worker.rank, "firings": edited.firings()}

        return _answer(firings)

    def edits_clear(self, slot: int) -> WorkerAnswer:
        """Clear a slot. Answers the last firings of its version."""

        def clear() -> WorkerAnswer:
            edited = self._edits().edited
            firings = edited.firings(slot)
            edited.clear(slot)
            return {"rank": edited.worker.rank, "firings": firings}

        return _answer(clear)


def _answer(act: Any) -> WorkerAnswer:
    try:
        answer: WorkerAnswer = act()
    except BundleRefused as refusal:
        return {"error": str(refusal), "reasons": [[reason.code, reason.message] for reason in refusal.reasons]}
    except EditsError as error:
        return {"error": str(error)}
    except Exception:  # noqa: BLE001  the API process decides; a bad version must not end a worker
        return {"error": traceback.format_exc()}
    return answer
