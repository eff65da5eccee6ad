"""Comparison of two versions: the edits that were added, removed or changed, and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.bundle import Bundle
from vllm_edits.edit_store.edits import Edit, Tensors
from vllm_edits.edit_store.errors import EditsError
from vllm_edits.edit_store.sites import Widths

ROUNDING = 1e-6
"""Relative difference below which two edits count as the same, since bundles hold float32."""
SAME, CHANGED, ADDED, REMOVED = "same", "changed", "added", "removed"


@dataclass(frozen=True)
class EditDifference:
    """One edit in two versions. `moved` is the norm of the difference over the norm of the older edit."""

    site: str
    kind: str
    change: str
    rank: str
    moved: float | None

    def as_row(self) -> dict[str, Any]:
        """Fields as shown, numbers rounded."""
        moved = "" if self.moved is None else f"{self.moved:.2%}"
        return {"site": self.site, "kind": self.kind, "change": self.change, "rank": self.rank, "moved": moved}


@dataclass(frozen=True)
class Difference:
    """Two versions side by side: fields of the manifest that differ, and every edit of either."""

    fields: dict[str, tuple[str, str]]
    edits: tuple[EditDifference, ...]


def compare(old: Bundle, new: Bundle) -> Difference:
    """Compare two bundles. BundleRefused when one of them breaks a rule."""
    before, after = verify.check(old), verify.check(new)
    if old.manifest.base.widths != new.manifest.base.widths:
        raise EditsError(
            f"{old.manifest.name} {old.version[:12]} is for {old.manifest.base.name}, "
            f"{new.manifest.name} {new.version[:12]} for {new.manifest.base.name}: models of different sizes, whose "
            "edits cannot be compared"
        )
    edits = [{(edit.site, edit.kind, edit.part): edit for edit in bundle.manifest.edits} for bundle in (old, new)]
    changes = [
        _change(edits[0].get(key), edits[1].get(key), before, after, new.manifest.base.widths)
        for key in sorted(edits[0].keys() | edits[1].keys())
    ]
    return Difference(_fields(old, new), tuple(changes))


def _fields(old: Bundle, new: Bundle) -> dict[str, tuple[str, str]]:
    def shown(bundle: Bundle) -> dict[str, str]:
        manifest = bundle.manifest
        return {
            "name": manifest.name, "label": manifest.label, "description": manifest.description,
            "base model": manifest.base.name, "base files": str(sorted(manifest.base.files.items())),
            "created at": manifest.created_at.isoformat(), "method": manifest.provenance.method,
            "tool": manifest.provenance.tool, "parameters": str(dict(sorted(manifest.provenance.parameters.items()))),
            **{f"measured {each.metric}": f"{each.edited:.4g}" for each in manifest.measurements},
        }  # fmt: skip

    before, after = shown(old), shown(new)
    return {
        field: (before.get(field, ""), after.get(field, ""))
        for field in [*before, *(field for field in after if field not in before)]
        if before.get(field) != after.get(field)
    }


def _change(old: Edit | None, new: Edit | None, before: Tensors, after: Tensors, widths: Widths) -> EditDifference:
    present = new or old
    assert present is not None  # noqa: S101  the key came from one of the two
    site, kind = present.site, present.kind
    ranks = [str(edit.capacity) for edit in (old, new) if edit is not None]
    rank = " -> ".join(dict.fromkeys(ranks))
    if old is None or new is None:
        return EditDifference(site, kind, ADDED if old is None else REMOVED, rank, None)
    fields = [
        {field: array.astype(np.float64) for field, array in edit.numbers(tensors, widths).items()}
        for edit, tensors in ((old, before), (new, after))
    ]
    moved = old.moved(new, *fields)
    same = moved is not None and moved <= ROUNDING and old == new
    return EditDifference(site, kind, SAME if same else CHANGED, rank, moved)
