"""Runs suites: on the edited model and its base model, in this process or behind a server."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version as version_of
from pathlib import Path

import httpx

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.authoring.build import pairs_of
from vllm_edits.edit_store.authoring.host import Host
from vllm_edits.edit_store.base_model import identify
from vllm_edits.edit_store.bundle import Bundle
from vllm_edits.edit_store.errors import BundleRefused, EditsError
from vllm_edits.edit_store.evaluation.figure import Report
from vllm_edits.edit_store.evaluation.in_transformers import HostSpeaker
from vllm_edits.edit_store.evaluation.over_http import ServerSpeaker
from vllm_edits.edit_store.evaluation.suite import Suite
from vllm_edits.edit_store.progress import StepDone
from vllm_edits.edit_store.refs import is_digest


def in_process(bundle: Bundle, model: Path, suite: Suite, step: StepDone, *, strength: float | None = None) -> Report:
    """Evaluate a bundle on its base model, in transformers. BundleRefused if it was made for another one."""
    base = identify(model)
    if reasons := verify.base_mismatch(bundle.manifest.base, base):
        raise BundleRefused(f"bundle {bundle.manifest.name!r} {bundle.version[:12]}", reasons)
    bounds = bundle.manifest.strength
    chosen = strength if strength is not None else bounds.default if bounds else 1.0
    host = Host.load(model)
    figures = suite.figures(HostSpeaker(host), HostSpeaker(host, pairs_of(bundle), chosen), step)
    return Report(
        suite=suite.name, suite_sha256=suite.sha256, variant=bundle.manifest.name, version=bundle.version,
        base=base.files, measured_by=f"transformers {version_of('transformers')}", at=_now(), figures=tuple(figures),
    )  # fmt: skip


def on_server(variant: str, url: str, suite: Suite, step: StepDone, *, api_key: str = "") -> Report:
    """Evaluate a variant on a running server, beside its base model, through its completions endpoint.

    EditsError if the variant was swapped meanwhile: figures of two versions would be no figures.
    """
    base, engine = _served(url, api_key)
    with ServerSpeaker(url, base, api_key=api_key) as plain, ServerSpeaker(url, variant, api_key=api_key) as edited:
        figures = tuple(suite.figures(plain, edited, step))
    if len(edited.versions) != 1:
        raise EditsError(
            f"{variant} was answered by {len(edited.versions)} versions: it moved while it was evaluated. Evaluate it "
            "again, or name one version as name@version"
        )
    (version,) = edited.versions
    if not is_digest(version):
        raise EditsError(f"expected a variant, found {variant}, which {url} answers with {version or 'no version'}")
    return Report(
        suite=suite.name, suite_sha256=suite.sha256, variant=variant.partition("@")[0], version=version,
        measured_by=engine, at=_now(), figures=figures,
    )  # fmt: skip


def _served(url: str, api_key: str) -> tuple[str, str]:
    """The base model's name on a server, and the engine with its version."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
            status, engine = client.get("/v1/edits"), client.get("/version")
            status.raise_for_status()
            engine.raise_for_status()
    except httpx.HTTPError as error:
        raise EditsError(f"{url} does not answer as a server of edits: {error}") from error
    return str(status.json()["base"]["names"][0]), f"vLLM {engine.json()['version']}"


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
