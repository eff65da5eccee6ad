"""What a worker answers when the API process calls it by name: stage, install, clear, describe.

vLLM runs these between two steps of the engine, so each must be short. Reading and checking a version takes longer and
runs in a thread meanwhile. Every answer is plain data: a refusal is an answer too, so no worker dies of one.
"""

from __future__ import annotations

import threading
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edit_store import verify
from edit_store.errors import BundleRefused, EditsError
from plugin.edited_model import Prepared
from plugin.reading import open_reader
from plugin.vllm_host import runner_v1

if TYPE_CHECKING:
    from plugin.vllm_host.loader import LoadedEdits

Answer = dict[str, Any]


@dataclass
class Staging:
    """A version being read and checked in the background; `answer` is set last."""

    answer: Answer | None = None
    prepared: Prepared | None = None


class EditsWorker:
    """Mixed into vLLM's worker class, as `--worker-extension-cls` would. Holds no state of its own."""

    @classmethod
    def extend(cls, worker_class: type) -> None:
        """Give the worker class these methods, once, the way vLLM itself adds a worker extension."""
        if not issubclass(worker_class, cls):
            worker_class.__bases__ = (*worker_class.__bases__, cls)

    def _edits(self) -> LoadedEdits:
        from plugin.vllm_host.loader import edits_of

        return edits_of(self.model_runner.get_model())  # type: ignore[attr-defined]

    def edits_attach(self) -> Answer:
        """Start filling token slots from the runner's batches, and describe what this worker can hold."""
        return _answer(self._attach)

    def _attach(self) -> Answer:
        loaded, runner = self._edits(), self.model_runner  # type: ignore[attr-defined]
        if loaded.runner == "V1":
            runner_v1.attach(runner, loaded.edited)
        return {
            "base": loaded.base.model_dump(mode="json"),
            "reserve": loaded.edited.reservation.to_settings(),
            "scopes": loaded.edited.reservation.scopes,
            "slots": loaded.edited.slots,
            "bytes": loaded.edited.bytes_reserved,
            "runner": loaded.runner,
        }

    def edits_stage(self, version: str) -> Answer:
        """Begin to read, check and convert a version in the background."""
        loaded = self._edits()
        if version not in loaded.staged:
            loaded.staged[version] = staging = Staging()
            threading.Thread(target=_stage, args=(loaded, version, staging), daemon=True).start()
        return {}

    def edits_staged(self, version: str) -> Answer:
        """{'pending': True}, or {} when the version is ready to install, or its refusal."""
        staging = self._edits().staged.get(version)
        if staging is None:
            return {"error": f"version {version[:12]} was never staged"}
        return staging.answer if staging.answer is not None else {"pending": True}

    def edits_install(self, slot: int, version: str) -> Answer:
        """Write a staged version into a free slot; answers the digest of what the slot then holds."""

        def install() -> Answer:
            loaded = self._edits()
            prepared = loaded.staged.pop(version).prepared
            if prepared is None:
                raise ValueError(f"version {version[:12]} is not ready to install")
            return {"digest": loaded.edited.install(slot, prepared)}

        return _answer(install)

    def edits_firings(self) -> Answer:
        """How often each gate on the device has fired since it was installed: [version, edit, times]."""

        def firings() -> Answer:
            edited = self._edits().edited
            told = [[version, *each] for slot, version in edited.held.items() for each in edited.firings(slot)]
            return {"firings": told}

        return _answer(firings)

    def edits_clear(self, slot: int | None, version: str) -> Answer:
        """Forget a version: its staging, and its slot if it had one. Answers its last firings."""

        def clear() -> Answer:
            loaded = self._edits()
            loaded.staged.pop(version, None)
            if slot is None:
                return {"firings": []}
            firings = [[version, *each] for each in loaded.edited.firings(slot)]
            loaded.edited.clear(slot)
            return {"firings": firings}

        return _answer(clear)


def _stage(loaded: LoadedEdits, version: str, staging: Staging) -> None:
    def prepare() -> Answer:
        bundle = open_reader(loaded.settings).bundle(version)
        tensors = verify.check(bundle, loaded.base)
        staging.prepared = loaded.edited.prepare(version, bundle.manifest, tensors)
        return {}

    staging.answer = _answer(prepare)


def _answer(act: Any) -> Answer:
    try:
        answer: Answer = act()
    except BundleRefused as refusal:
        return {"error": str(refusal), "reasons": [[reason.code, reason.message] for reason in refusal.reasons]}
    except EditsError as error:
        return {"error": str(error)}
    except Exception:  # noqa: BLE001  the API process decides; a worker must not die of a bad version
        return {"error": traceback.format_exc()}
    return answer
