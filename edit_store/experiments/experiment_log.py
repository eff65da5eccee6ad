"""Reads and changes the experiments of a store. Each change by a command or a server is one entry of the log."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_edits.edit_store.bundle import GATE_FIRINGS, Manifest
from vllm_edits.edit_store.canonical import now
from vllm_edits.edit_store.errors import AmbiguousVersion, ExperimentRefused, NotFound, Reason
from vllm_edits.edit_store.experiments.document import BASE, Arm, Experiment
from vllm_edits.edit_store.experiments.state import (
    FOLDER,
    ExperimentChange,
    ExperimentEntry,
    Standing,
    Standings,
    after,
    fold,
    is_of_variant,
    need,
)
from vllm_edits.edit_store.refs import DEFAULT_TAG, Ref
from vllm_edits.edit_store.signing import Role, SigningKey
from vllm_edits.edit_store.storage.intents import relying_on
from vllm_edits.edit_store.storage.log import Log
from vllm_edits.edit_store.storage.store import EditStore


def log_of(store: EditStore) -> Log[ExperimentEntry]:
    """The log of all experiments of a store."""
    return Log(store.backend, FOLDER, ExperimentEntry, "the experiments", "vllm-edits experiment history")


class Experiments:
    """The experiments of one store. A change is checked against the whole log before it is appended."""

    def __init__(self, store: EditStore) -> None:
        self._store = store
        self._log = log_of(store)

    def history(self, name: str | None = None) -> list[ExperimentEntry]:
        """All entries, or the entries of one experiment, oldest first. The chain is checked."""
        entries = self._log.history()
        if name is None:
            return entries
        need(fold(entries)[0], name)
        return [entry for entry in entries if entry.experiment == name]

    def standings(self) -> tuple[Standings, list[str]]:
        """The state of every experiment, and a message for each entry that has no effect."""
        return fold(self._log.history())

    def create(self, document: Experiment, *, reason: str = "", actor: str | None = None) -> Standing:
        """Create an experiment, or replace the document of an experiment.

        A running experiment accepts a document only if no unit changes its arm. Versions of arms are stored as complete
        digests.
        """
        versions, document = self._resolved(document)
        blobs = [self._store.manifest(version).tensors.sha256 for version in versions]
        with relying_on(self._store.backend, [*versions, *blobs]):
            change = ExperimentChange(experiment=document.name, operation="create", document=document)
            return self.change(change, reason=reason, actor=actor)

    def change(self, change: ExperimentChange, *, reason: str = "", actor: str | None = None) -> Standing:
        """Append a change. NotFound, Conflict or ExperimentRefused if it is not possible; nothing is written then."""
        entries = self._log.history()
        standing = after(fold(entries)[0], change, now(), reason)
        if change.operation == "start":
            self._resolved(standing.document)
        self._store.append(
            self._log, entries[-1] if entries else None, f"experiment {change.experiment}", reason=reason, actor=actor,
            **{name: getattr(change, name) for name in ExperimentChange.model_fields},
        )  # fmt: skip
        return standing

    def sign(self, name: str, signer: SigningKey) -> list[int]:
        """Sign every entry of an experiment that this key has not signed yet; returns their numbers."""
        signed = []
        for entry in self.history(name):
            if all(known.keyid != signer.keyid for known in self._store.signatures(entry.digest)):
                what = f"experiment {name} entry {entry.sequence}"
                self._store.attest(entry.digest, signer.sign(Role.PROMOTER, entry.digest, what))
                signed.append(entry.sequence)
        return signed

    def promote(
        self, name: str, arm: str, *, tag: str = DEFAULT_TAG, reason: str = "", actor: str | None = None
    ) -> Standing:
        """Serve one arm to all units.

        If the arm serves a version of the variant that clients name, that version is promoted under the variant's tag,
        and the experiment ends. Else the experiment continues, and gives every unit this arm.
        """
        standing = need(self.standings()[0], name)
        change = ExperimentChange(experiment=name, operation="promote", arm=arm)
        after({name: standing}, change, now(), reason)  # refused before the tag moves
        if is_of_variant(standing.document, arm):
            # First the tag: after a crash the experiment still runs, and the command can be repeated.
            serves = standing.document.arm(arm).serves
            version = self._store.resolve(serves)
            head = self._store.head(Ref.parse(serves).name, tag)
            if head is None or head.withdrawn or head.version != version:
                why = reason or f"arm {arm} of experiment {name}"
                self._store.promote(f"{Ref.parse(serves).name}@{version}", tag=tag, reason=why, actor=actor)
        return self.change(change, reason=reason, actor=actor)

    def _resolved(self, document: Experiment) -> tuple[list[str], Experiment]:
        """The versions of the arms, and the document with their digests. ExperimentRefused if one is missing."""
        reasons: list[Reason] = []
        arms, manifests, named = [], {}, []
        for arm in document.arms:
            try:
                version = None if arm.serves == BASE else self._store.resolve(arm.serves)
            except (NotFound, AmbiguousVersion) as error:
                reasons.append(Reason("arm", f"arm {arm.name!r} cannot be served: {error}"))
                continue
            if version is not None:
                manifests[arm.name] = self._store.manifest(version)
                ref = Ref.parse(arm.serves)
                if ref.is_version:
                    named.append(version)
                    arm = Arm(name=arm.name, serves=f"{ref.name}@{version}", weight=arm.weight)  # noqa: PLW2901
            arms.append(arm)
        reasons += _of_several_bases(manifests)
        reasons += _unmeasured(document, manifests)
        if reasons:
            raise ExperimentRefused(f"experiment {document.name!r}", reasons)
        return named, document.model_copy(update={"arms": tuple(arms)})


def _unmeasured(document: Experiment, manifests: dict[str, Manifest]) -> Iterator[Reason]:
    """Reasons for arms whose version lacks a measurement that a guardrail needs."""
    if all(rule.maximum_authored_ratio is None for rule in document.guardrails):
        return
    for arm in document.arms[1:]:
        if arm.name in manifests and manifests[arm.name].gate_firings is None:
            yield Reason(
                "guardrails",
                f"maximum_authored_ratio: the version of arm {arm.name!r} has no measurement {GATE_FIRINGS}. "
                "Publish it with that measurement, or give the rule a maximum",
            )


def _of_several_bases(manifests: dict[str, Manifest]) -> Iterator[Reason]:
    """Reasons for arms that edit different base models, so that no server can serve them all."""
    first = next(iter(manifests), None)
    for arm, manifest in manifests.items():
        if first is not None and manifest.base != manifests[first].base:
            yield Reason(
                "arm",
                f"arm {arm!r} edits {manifest.base.name}, but arm {first!r} edits {manifests[first].base.name}: no "
                "server has both base models. Use versions for one base model",
            )
