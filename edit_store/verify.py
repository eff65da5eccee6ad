"""Every rule a bundle must keep, for publishing and for serving. Returns all broken rules, never the first alone."""

from __future__ import annotations

from collections import Counter

import numpy as np

from edit_store import tensor_file
from edit_store.bundle import BaseModelRef, BlobRef, Bundle
from edit_store.edits import Edit, SubspaceFilter, Tensors
from edit_store.errors import BundleRefused, Reason
from edit_store.sites import Site, Widths

ORTHONORMAL_TOLERANCE = 1e-4


def check(bundle: Bundle, base: BaseModelRef | None = None) -> Tensors:
    """The bundle's tensors, if it keeps every rule (and, with `base`, was made for that model); else BundleRefused."""
    manifest, reasons = bundle.manifest, []
    if base is not None:
        reasons += base_mismatch(manifest.base, base)
    named, found = manifest.tensors, BlobRef.of(bundle.tensor_bytes)
    if found != named:
        reasons.append(Reason("digest", f"tensor file is {found}, the manifest names {named}: truncated or replaced"))
    tensors, broken = tensor_file.read(bundle.tensor_bytes)
    reasons += broken
    reasons += _edit_rules(manifest.edits, manifest.base.widths)
    if not broken:
        reasons += _tensor_rules(manifest.edits, manifest.base.widths, tensors)
    if reasons:
        raise BundleRefused(f"bundle {manifest.name!r} {bundle.version[:12]}", reasons)
    return tensors


def base_mismatch(built_for: BaseModelRef, served: BaseModelRef) -> list[Reason]:
    """Why a bundle built for one model must not be applied to another."""
    if built_for.files == served.files:
        return []
    names = sorted(built_for.files.keys() | served.files.keys())
    differing = [name for name in names if built_for.files.get(name) != served.files.get(name)]
    return [
        Reason(
            "base_model",
            f"built for {built_for.name} but this is {served.name}: {', '.join(differing)} differ(s). "
            f"Build it for this model, or serve {built_for.name}",
        )
    ]


def _edit_rules(edits: tuple[Edit, ...], widths: Widths) -> list[Reason]:
    reasons = []
    for (site, kind), count in Counter((edit.site, edit.kind) for edit in edits).items():
        if count > 1:
            reasons.append(Reason("duplicate_site", f"{count} {kind} edits at {site}; at most one, raise its rank"))
    for edit in edits:
        if why := edit.misplaced():
            reasons.append(Reason("site", why))
        if Site.parse(edit.site).layer >= widths.layers:
            reasons.append(Reason("site", f"{edit.site}: the model has layers 0 to {widths.layers - 1}"))
    return reasons


def _tensor_rules(edits: tuple[Edit, ...], widths: Widths, tensors: Tensors) -> list[Reason]:
    reasons = []
    expected = {edit.tensor_name(field): shape for edit in edits for field, shape in edit.shapes(widths).items()}
    for name, shape in expected.items():
        if name not in tensors:
            reasons.append(Reason("missing_tensor", f"tensor {name} of shape {list(shape)} is missing"))
        elif tensors[name].shape != shape:
            reasons.append(Reason("shape", f"tensor {name}: expected {list(shape)}, found {list(tensors[name].shape)}"))
    reasons += [
        Reason("unknown_tensor", f"tensor {name} belongs to no edit")
        for name in sorted(tensors.keys() - expected.keys())
    ]
    for edit in edits:
        basis = tensors.get(edit.tensor_name("basis")) if isinstance(edit, SubspaceFilter) else None
        if basis is not None and basis.ndim == 2 and np.isfinite(basis).all():
            error = float(np.abs(basis @ basis.T - np.eye(len(basis), dtype=np.float32)).max())
            if error > ORTHONORMAL_TOLERANCE:
                reasons.append(
                    Reason(
                        "not_orthonormal", f"{edit.tensor_name('basis')}: rows must be orthonormal, off by {error:.1e}"
                    )
                )
    return reasons
