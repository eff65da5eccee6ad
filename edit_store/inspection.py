"""What is in a bundle, in numbers a person can judge: norms per edit, relative to the weights it touches."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edit_store import verify
from edit_store.bundle import Bundle
from edit_store.edits import Edit, LowRank, Offset, Scale, SubspaceFilter, Tensors
from edit_store.sites import Site

_DOWN_PROJECTION = "model.layers.{layer}.mlp.down_proj.weight"


@dataclass(frozen=True)
class EditSummary:
    """One edit. `norm` is in the unit of its kind; `relative` compares it with the weight it changes, if any."""

    site: str
    kind: str
    rank: int
    norm: float
    of: str
    relative: float | None = None

    def as_row(self) -> dict[str, Any]:
        """Fields as shown, numbers rounded."""
        relative = "" if self.relative is None else f"{self.relative:.2%}"
        return {**asdict(self), "norm": float(f"{self.norm:.4g}"), "relative": relative}

    @staticmethod
    def columns(*, relative: bool) -> dict[str, str]:
        """Table headings by field."""
        shown = {"site": "site", "kind": "kind", "rank": "rank", "norm": "norm", "of": "of"}
        return {**shown, "relative": "of the weight"} if relative else shown


def summarise(bundle: Bundle, model: Path | None = None) -> list[EditSummary]:
    """One line per edit; with `model`, low-rank edits are compared with the weight they add to."""
    tensors = verify.check(bundle)
    return [_summary(edit, tensors, model) for edit in bundle.manifest.edits]


def _summary(edit: Edit, tensors: Tensors, model: Path | None) -> EditSummary:
    def tensor(field: str) -> Any:
        return tensors[edit.tensor_name(field)]

    if isinstance(edit, LowRank):
        norm = low_rank_norm(tensor("read"), tensor("write"))
        weight = (
            None if model is None else _weight_norm(model, _DOWN_PROJECTION.format(layer=Site.parse(edit.site).layer))
        )
        return EditSummary(
            edit.site,
            edit.kind,
            edit.rank,
            norm,
            "Frobenius norm of the change of W",
            norm / weight if weight else None,
        )
    if isinstance(edit, Scale):
        changed = tensor("factor") != 1
        return EditSummary(
            edit.site, edit.kind, 1, float(changed.sum()), f"heads changed: {np.flatnonzero(changed).tolist()}"
        )
    if isinstance(edit, SubspaceFilter):
        return EditSummary(
            edit.site,
            edit.kind,
            edit.rank,
            float(np.linalg.norm(tensor("basis") @ tensor("mean"))),
            "mean inside the subspace",
        )
    assert isinstance(edit, Offset)  # noqa: S101  the union has no other member
    return EditSummary(
        edit.site, edit.kind, 1, float(np.linalg.norm(tensor("vector"))), "vector added to the residual stream"
    )


def low_rank_norm(read: Any, write: Any) -> float:
    """||write^T read||_F without forming the product: sqrt(sum of (write write^T) * (read read^T))."""
    return float(np.sqrt(max(0.0, float(np.sum((write @ write.T) * (read @ read.T))))))


def _weight_norm(model: Path, name: str) -> float | None:
    """Frobenius norm of a checkpoint's tensor, read without torch (numpy has no bfloat16, so it is widened by hand)."""
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length)).get(name)
            if entry is None or entry["dtype"] not in ("BF16", "F16", "F32"):
                continue
            begin, end = entry["data_offsets"]
            file.seek(8 + length + begin)
            data = file.read(end - begin)
        if entry["dtype"] == "BF16":
            numbers = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            numbers = np.frombuffer(data, "<f2" if entry["dtype"] == "F16" else "<f4")
        return float(np.linalg.norm(numbers.astype(np.float64)))
    return None
