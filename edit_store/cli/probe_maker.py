"""Makes the probes of a bundle for commands, with progress. Torch is imported when it runs, and not before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.base_model import identify
from vllm_edits.edit_store.bundle import Bundle
from vllm_edits.edit_store.cli.common import counted, opened
from vllm_edits.edit_store.errors import BundleRefused, EditsError
from vllm_edits.edit_store.probes import Probe


def made_for(
    bundle: Bundle, model: Path, texts: Sequence[str] = (), *, count: int = 4, store: str | None
) -> Sequence[Probe]:
    """Probes of a bundle, behind these texts and the prompts of its own probes or, of a composition, of its parts'.

    store: has the parts of a composition
    """
    try:
        from vllm_edits.edit_store.authoring.build import pairs_of
        from vllm_edits.edit_store.authoring.host import Host
        from vllm_edits.edit_store.authoring.probing import probes_of
    except ImportError as error:
        raise EditsError(f"{error}. Install the authoring side: pip install 'vllm-edits[authoring]'") from None
    parts = [opened(store).manifest(part.version) for part in bundle.manifest.parts] if store else []
    recorded = [probe.prompt for manifest in (bundle.manifest, *parts) for probe in manifest.probes]
    with counted("digest of the base model", in_bytes=True) as update:
        base = identify(model, progress=lambda done: update(advance=done))
    if reasons := verify.base_mismatch(bundle.manifest.base, base):
        raise BundleRefused(f"bundle {bundle.manifest.name!r} {bundle.version[:12]}", reasons)
    edits, strength = pairs_of(bundle), bundle.manifest.strength
    return probes_of(Host.load(model), edits, [*texts, *recorded], strength=strength, count=count)
