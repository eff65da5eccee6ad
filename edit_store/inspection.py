"""Summary of a bundle in numbers that people can judge: the norm of each edit, relative to the weight it changes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.architectures import Architecture, supported
from vllm_edits.edit_store.base_model import CONFIG_FILE, tensor_entries, widths_of
from vllm_edits.edit_store.bundle import Bundle
from vllm_edits.edit_store.edits import Edit, Measure
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.edit_store.kinds import KINDS
from vllm_edits.edit_store.sites import POINTS, Site


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
    """One line per edit; with `model`, changes of a weight are compared with the weight that they are added to."""
    tensors, base = verify.check(bundle), bundle.manifest.base
    measured = [(edit, edit.measure(edit.numbers(tensors, base.widths))) for edit in bundle.manifest.edits]
    return [_summary(edit, measure, supported(base.architecture), model) for edit, measure in measured]


def _summary(edit: Edit, measure: Measure, architecture: Architecture, model: Path | None) -> EditSummary:
    site, weight = Site.parse(edit.site), None
    if model is not None and measure.of_weight and site.point == "mlp.out" and edit.source.endswith("mlp.h"):
        down = f"{architecture.layer_path(site.layer or 0)}.{architecture.mlp}.{architecture.down}.weight"
        weight = _weight_norm(model, down)
    relative = measure.norm / weight if weight else None
    return EditSummary(edit.site, edit.kind, edit.capacity, measure.norm, measure.of, relative)


def sites_of(model: Path) -> dict[str, Any]:
    """Every site of the model whose config is there, with the kinds that may be at it; and the points it lacks."""
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
                name for name, kind in KINDS.items()
                if site.point in kind.points and kind.sources(site, architecture.reads(site.point))
            ],
        }
        for site in architecture.sites(widths.layers)
    ]  # fmt: skip
    hidden = {point: why for point in POINTS if (why := architecture.hidden(point))}
    return {"architecture": name, "layers": widths.layers, "sites": rows, "hidden": hidden}


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
