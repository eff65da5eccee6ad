"""Probes versions: before its first request, the engine continues a version's probes in the slot where it will serve.

It runs in the API process that owns the slots, beside running requests: one probe at a time, a few tokens each. A
version that does not say what its author recorded is refused with the figures, and what was served before keeps
serving. How figures are judged is in `vllm_edits.edit_store.probes`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from vllm_edits.edit_store.bundle import Manifest
from vllm_edits.edit_store.errors import EditsError, InstallRefused, Reason
from vllm_edits.edit_store.probes import Probe, ProbeReport, Trace, compare
from vllm_edits.plugin.claim import Claim
from vllm_edits.plugin.metrics import Metrics
from vllm_edits.server_config.settings import ProbePolicy

logger = logging.getLogger("vllm.edits")

ANSWER_SECONDS = 120.0
"""time limit for one probe; the engine may be busy with long prompts"""
WEIGHTS_SLOT = 0
"""slot of the version in the engine's weights"""
Result = Literal["passed", "weak", "failed", "none"]


class Continuing(Protocol):
    """The engines, as far as probes need them."""

    @property
    def engines(self) -> int:
        """The number of engines. Each has slots of its own."""

    @property
    def floor(self) -> float:
        """Least noise of log-probabilities, in nats."""

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its continuation."""

    async def continued(self, probe: Probe, claim: Claim | None, engine: int) -> Trace:
        """The greedy continuation of a probe's prompt, by the base model if there is no claim. Nothing is cached."""


@dataclass(frozen=True)
class ProbeRun:
    """The last probes of a version on this server."""

    at: str
    seconds: float
    reports: tuple[ProbeReport, ...] = ()
    """one for each engine; none for a version without probes"""

    @property
    def result(self) -> Result:
        """The worst of all engines."""
        if not self.reports:
            return "none"
        if not all(report.passed for report in self.reports):
            return "failed"
        return "weak" if any(report.weak for report in self.reports) else "passed"

    @property
    def worst(self) -> ProbeReport:
        """The report of the engine whose share is farthest from 1, of those that failed if any did."""
        return max(self.reports, key=lambda report: (not report.passed, abs(report.share - 1)))

    def as_json(self) -> dict[str, Any]:
        """The figures as plain data, of the worst engine."""
        facts = {"result": self.result, "at": self.at, "seconds": self.seconds}
        return {**facts, **(self.worst.as_json() if self.reports else {})}


class _NoEngine:
    """`Continuing` where no engine tells log-probabilities: probes that are asked for are refused."""

    engines = 1
    floor = 0.0
    longest = 1 << 30

    async def continued(self, probe: Probe, claim: Claim | None, engine: int) -> Trace:
        raise EditsError("no probe is possible, because the server's --logprobs-mode tells no log-probabilities")


class Prober:
    """Probes versions, and keeps the last result of each."""

    def __init__(self, engine: Continuing | None, metrics: Metrics, *, policy: ProbePolicy) -> None:
        """engine: None where nothing can be asked; then nothing is probed."""
        self.policy: ProbePolicy = policy if engine is not None else "off"
        self.last: dict[str, ProbeRun] = {}
        self._engine: Continuing = engine or _NoEngine()
        self._metrics = metrics
        self._manifests: dict[str, Manifest] = {}

    def know(self, version: str, manifest: Manifest) -> None:
        """Note the manifest of a version that was read."""
        self._manifests[version] = manifest

    def require_probes(self, version: str) -> None:
        """InstallRefused for a version without probes, where the policy wants some."""
        manifest = self._manifests[version]
        if self.policy == "require" and not manifest.probes:
            raise InstallRefused(f"version {version[:12]} of {manifest.name!r}", [Reason(
                "no_probes", "edits.probes is require, and the version has no probes. Make some: vllm-edits probes add "
                f"{manifest.name}@{version[:12]} MODEL --store STORE",
            )])  # fmt: skip

    def require_sound(self, version: str) -> None:
        """InstallRefused for a version whose last probes failed."""
        run = self.last.get(version)
        if run is not None and run.result == "failed":
            raise self._refusal(version, run)

    def failed(self) -> list[str]:
        """Versions whose last probes failed."""
        return [version for version, run in self.last.items() if run.result == "failed"]

    async def first(self, version: str, slot: int) -> None:
        """Probe a version in its slot, unless it has passed before. InstallRefused if it fails."""
        run = self.last.get(version)
        if self.policy != "off" and (run is None or run.result == "failed"):
            await self.probe(version, slot)
            self.require_sound(version)

    async def probe(self, version: str, slot: int) -> ProbeRun:
        """Probe a version in its slot now. EditsError if the engine does not answer."""
        manifest, started = self._manifests[version], time.monotonic()
        default = manifest.strength.default if manifest.strength else 1.0
        # The weights hold the edits at one strength; and a prompt may be too long for this server.
        probes = [
            probe
            for probe in manifest.probes
            if (slot != WEIGHTS_SLOT or probe.strength == default)
            and len(probe.prompt) + probe.places <= self._engine.longest
        ]
        try:
            engines = range(self._engine.engines) if probes else ()
            reports = [await self._report(version, slot, probes, engine) for engine in engines]
        except EditsError:
            raise
        except Exception as error:
            raise EditsError(f"the engine did not answer the probes of version {version[:12]}: {error!r}") from error
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        run = self.last[version] = ProbeRun(at, round(time.monotonic() - started, 3), tuple(reports))
        self._tell(version, manifest, run)
        return run

    async def _report(self, version: str, slot: int, probes: list[Probe], engine: int) -> ProbeReport:
        base: list[Trace | None] = []
        edited: list[Trace] = []
        for probe in probes:
            there = self._answered(probe, Claim(slot, version, probe.strength), engine)
            if slot == WEIGHTS_SLOT:  # the base model is not there
                base.append(None)
                edited.append(await there)
            else:
                of_base, of_edited = await asyncio.gather(self._answered(probe, None, engine), there)
                base.append(of_base)
                edited.append(of_edited)
        return compare(probes, base, edited, floor=self._engine.floor)

    async def _answered(self, probe: Probe, claim: Claim | None, engine: int) -> Trace:
        try:
            return await asyncio.wait_for(self._engine.continued(probe, claim, engine), ANSWER_SECONDS)
        except TimeoutError:
            raise EditsError(f"the engine did not answer a probe within {ANSWER_SECONDS:g} s") from None

    def _tell(self, version: str, manifest: Manifest, run: ProbeRun) -> None:
        """Log and count a run."""
        self._metrics.probes.labels(run.result).inc()
        name = f"{manifest.name} version={version[:12]}"
        if run.result == "none":
            logger.warning(
                "probes none variant=%s: it has no probes, so nothing shows that it is served as its author made it. "
                "Make some with `vllm-edits probes add`", name,
            )  # fmt: skip
            return
        self._metrics.probe_seconds.observe(run.seconds)
        self._metrics.probe_share.labels(*self._metrics.labels(manifest.name, version)).set(run.worst.share)
        log = {"failed": logger.error, "weak": logger.warning}.get(run.result, logger.info)
        log("probes %s variant=%s seconds=%.3f: %s", run.result, name, run.seconds, run.worst.told())

    def _refusal(self, version: str, run: ProbeRun) -> InstallRefused:
        name = self._manifests[version].name
        return InstallRefused(f"version {version[:12]} of {name!r}", [Reason(
            "probes", f"this server does not say what its author recorded: {run.worst.told()}. Build the version again "
            "for this model, or set edits.probes to off and restart",
        )])  # fmt: skip

    def told_of(self, version: str) -> Mapping[str, Any] | None:
        """The last run of a version as plain data; None before the first."""
        run = self.last.get(version)
        return None if run is None else run.as_json()
