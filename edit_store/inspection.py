"""What is in a bundle, in numbers a person can judge: norms per edit, relative to the weights it touches."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.base_model import CONFIG_FILE, tensor_entries, widths_of
from vllm_edits.edit_store.bundle import Bundle
from vllm_edits.edit_store.edits import Edit, Tensors
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.edit_store.kinds import KINDS
from vllm_edits.edit_store.kinds.gate import Gate
from vllm_edits.edit_store.kinds.low_rank import LowRank
from vllm_edits.edit_store.kinds.offset import Offset
from vllm_edits.edit_store.kinds.scale import Scale
from vllm_edits.edit_store.kinds.subspace_filter import SubspaceFilter
from vllm_edits.edit_store.kinds.weight_delta import WeightDelta
from vllm_edits.edit_store.sites import POINTS, Site

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

    def summary(norm: Any, of: str, relative: float | None = None) -> EditSummary:
        return EditSummary(edit.site, edit.kind, edit.capacity, float(norm), of, relative)

    if isinstance(edit, LowRank):
        norm = low_rank_norm(tensor("read"), tensor("write"))
        if edit.source == edit.site:
            return summary(norm, "Frobenius norm of the map added")
        site = Site.parse(edit.site)
        weighed = model is not None and site.point == "mlp.out" and edit.source.endswith("mlp.h")
        weight = _weight_norm(model, _DOWN_PROJECTION.format(layer=site.layer)) if model and weighed else None
        return summary(norm, "Frobenius norm of the change of W", norm / weight if weight else None)
    if isinstance(edit, Scale):
        changed = tensor("factor") != 1
        return summary(changed.sum(), f"{edit.per}s changed: {_shortened(np.flatnonzero(changed).tolist())}")
    if isinstance(edit, SubspaceFilter):
        kept = "kept" if edit.onto else "removed"
        return summary(np.linalg.norm(tensor("basis") @ tensor("mean")), f"mean inside the subspace that is {kept}")
    if isinstance(edit, Gate):
        writes = np.linalg.norm(tensor("write"), axis=-1)
        return summary(writes.max(), f"longest vector added per unit of {edit.activation}")
    if isinstance(edit, WeightDelta):
        return summary(np.linalg.norm(tensor("values" if edit.count else "delta")), "Frobenius norm of the change of W")
    if isinstance(edit, Offset):
        return summary(np.linalg.norm(tensor("vector")), "vector added" + (", the norm kept" if edit.renorm else ""))
    raise TypeError(f"no summary of {edit.kind}")


def _shortened(numbers: list[int], most: int = 12) -> str:
    return f"{numbers[:most]} and {len(numbers) - most} more" if len(numbers) > most else str(numbers)


def sites_of(model: Path) -> dict[str, Any]:
    """Every site of the model whose config lies there, with what may stand at it; and the points it does not have."""
    path = model / CONFIG_FILE if model.is_dir() else model
    try:
        config = json.loads(path.read_bytes())
        name, widths = (config.get("architectures") or ["unknown"])[0], widths_of(config)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedHost(f"{path} is no config of a language model: {error!r}") from None
    architecture = supported(name)
    rows = [
        {
            "site": str(site), "layer": site.layer, "width": widths.of(site.point),
            "heads": widths.heads_at(site.point) or "",
            "reads": architecture.reads(site.point),
            "kinds": [
                kind for kind, edit in KINDS.items()
                if site.point in edit.points and (kind != "weight_delta" or architecture.reads(site.point))
            ],
        }
        for site in architecture.sites(widths.layers)
    ]  # fmt: skip
    hidden = {point: why for point in POINTS if (why := architecture.hidden(point))}
    return {"architecture": name, "layers": widths.layers, "sites": rows, "hidden": hidden}


def low_rank_norm(read: Any, write: Any) -> float:
    """||write^T read||_F without forming the product: sqrt(sum of (write write^T) * (read read^T))."""
    return float(np.sqrt(max(0.0, float(np.sum((write @ write.T) * (read @ read.T))))))


def _weight_norm(model: Path, name: str) -> float | None:
    """Frobenius norm of a checkpoint's tensor, read without torch (numpy has no bfloat16, so it is widened by hand)."""
    for path in sorted(model.glob("*.safetensors")):
        entries, start = tensor_entries(path)
        entry = entries.get(name)
        if entry is None or entry["dtype"] not in ("BF16", "F16", "F32"):
            continue
        begin, end = entry["data_offsets"]
        with path.open("rb") as file:
            file.seek(start + begin)
            data = file.read(end - begin)
        if entry["dtype"] == "BF16":
            numbers = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            numbers = np.frombuffer(data, "<f2" if entry["dtype"] == "F16" else "<f4")
        return float(np.linalg.norm(numbers.astype(np.float64)))
    return None
