"""Every rule a bundle must keep, for publishing and for serving. Returns all broken rules, never the first alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from vllm_edits.edit_store import tensor_file
from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.bundle import BaseModelRef, BlobRef, Bundle, Manifest
from vllm_edits.edit_store.edits import Array, Edit, Tensors
from vllm_edits.edit_store.errors import BundleRefused, Reason, UnsupportedHost
from vllm_edits.edit_store.kinds.gate import Gate
from vllm_edits.edit_store.kinds.scale import Scale
from vllm_edits.edit_store.kinds.subspace_filter import SubspaceFilter
from vllm_edits.edit_store.kinds.weight_delta import WeightDelta
from vllm_edits.edit_store.refs import JOIN
from vllm_edits.edit_store.sites import Site, Widths

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
    reasons += edit_rules(manifest.edits, manifest.base)
    reasons += _part_rules(manifest)
    if not broken:
        reasons += _tensor_rules(manifest.edits, manifest.base.widths, tensors)
    if reasons:
        raise BundleRefused(f"bundle {manifest.name!r} {bundle.version[:12]}", reasons)
    return tensors


def _part_rules(manifest: Manifest) -> Iterator[Reason]:
    names = JOIN.join(part.name for part in manifest.parts)
    if names != manifest.name and (manifest.parts or JOIN in manifest.name):
        yield Reason("composition", f"a composition is named after its parts: expected {names!r}")
    if manifest.parts and (count := sum(part.edits for part in manifest.parts)) != len(manifest.edits):
        yield Reason("composition", f"{len(manifest.edits)} edits, its parts have {count}")


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


def edit_rules(edits: Iterable[Edit], base: BaseModelRef) -> list[Reason]:
    """Why these edits cannot stand where they stand in that model, their numbers aside."""
    edits = tuple(edits)
    reasons = [
        Reason(
            "duplicate_site", f"{count} {kind} edits at {site} with part {part}; number them from 1, or raise a rank"
        )
        for (site, kind, part), count in Counter((edit.site, edit.kind, edit.part) for edit in edits).items()
        if count > 1
    ]
    for edit in edits:
        if why := edit.misplaced():
            reasons.append(Reason("site", why))
        for site in dict.fromkeys((edit.site, edit.source)):
            layer = Site.parse(site).layer
            if layer is not None and layer >= base.widths.layers:
                reasons.append(Reason("site", f"{site}: the model has layers 0 to {base.widths.layers - 1}"))
        if edit.scope.tokens and edit.scope.tokens[-1] >= base.widths.vocab:
            found = edit.scope.tokens[-1]
            reasons.append(Reason("scope", f"{edit.site}: token {found}, the model has 0 to {base.widths.vocab - 1}"))
        if not edit.scope.everything and edit.kind == "weight_delta":
            reasons.append(Reason("scope", f"weight_delta at {edit.site}: a weight has no scope"))
        reasons += _architecture_rules(edit, base)
    return reasons


def _architecture_rules(edit: Edit, base: BaseModelRef) -> Iterator[Reason]:
    try:
        architecture = supported(base.architecture)
    except UnsupportedHost as unknown:
        yield Reason("architecture", str(unknown))
        return
    for site in dict.fromkeys((edit.site, edit.source)):
        if why := architecture.hidden(Site.parse(site).point):
            yield Reason("site", f"{site} does not exist: {why}")
    point = Site.parse(edit.site).point
    if isinstance(edit, Scale) and edit.per == "head" and point in ("q.proj", "k.proj"):
        yield Reason(
            "site",
            f"per-head scale at {edit.site}: the norm that follows takes a head's size away again, so it would do "
            f"nothing. Scale {edit.site.removesuffix('proj')}out",
        )
    if architecture.qk_norm and point in ("q.out", "k.out"):
        if edit.source != edit.site:
            yield Reason(
                "site",
                f"{edit.kind} from {edit.source} to {edit.site}: in {base.architecture} a norm stands between the two, "
                f"so it would be no update of the projection. Write to {edit.site.removesuffix('out')}proj",
            )
    elif isinstance(edit, Scale) and edit.bias is None and point.replace(".proj", ".out") in base.biased:
        yield Reason(
            "bias",
            f"scale at {edit.site}: {base.name} adds a bias there, which would be scaled too. Say so with "
            "bias='scaled', and to leave the bias out add an offset of (1 - factor) * bias",
        )


def _tensor_rules(edits: tuple[Edit, ...], widths: Widths, tensors: Tensors) -> list[Reason]:
    reasons: list[Reason] = []
    expected = {edit.tensor_name(field): shape for edit in edits for field, shape in edit.shapes(widths).items()}
    reasons += [
        Reason("unknown_tensor", f"tensor {name} belongs to no edit")
        for name in sorted(tensors.keys() - expected.keys())
    ]
    for edit in edits:
        wrong = [*_shape_rules(edit, widths, tensors)]
        reasons += wrong
        if not wrong:
            fields = edit.numbers(tensors, widths)
            if all(np.isfinite(array).all() for array in fields.values()):
                rules = _NUMBER_RULES.get(edit.kind, _no_rules)
                reasons += [Reason(code, f"{edit.tensor_name(field)}: {why}") for code, field, why in
                            rules(edit, widths, fields)]  # fmt: skip
    return reasons


def _shape_rules(edit: Edit, widths: Widths, tensors: Tensors) -> Iterator[Reason]:
    for field, shape in edit.shapes(widths).items():
        name = edit.tensor_name(field)
        if name not in tensors:
            hint = " A gate that normalises needs the norm before its site" if field.startswith("norm_") else ""
            yield Reason("missing_tensor", f"tensor {name} of shape {list(shape)} is missing.{hint}")
        elif tensors[name].shape != shape:
            found = list(tensors[name].shape)
            hint = ""
            if widths.heads_at(Site.parse(edit.site).point) == widths.kv_heads != widths.heads and found == [
                widths.heads
            ]:
                hint = f". Keys and values have {widths.kv_heads} heads here, not the {widths.heads} of the queries"
            yield Reason("shape", f"tensor {name}: expected {list(shape)}, found {found}{hint}")


Broken = tuple[str, str, str]
"""Code, field and reason of a broken rule."""
NumberRules = Callable[..., Iterator[Broken]]


def _no_rules(*_: object) -> Iterator[Broken]:
    yield from ()


def _filter_rules(edit: SubspaceFilter, _: Widths, fields: dict[str, Array]) -> Iterator[Broken]:
    # In float32 the products of great numbers would overflow.
    basis, other = (fields[name].astype(np.float64) for name in ("basis", "dual" if edit.oblique else "basis"))
    error = float(np.abs(basis @ other.T - np.eye(len(basis))).max())
    if error > ORTHONORMAL_TOLERANCE:
        if edit.oblique:
            yield "not_dual", "dual", f"basis dual^T must be the identity, off by {error:.1e}"
        else:
            yield "not_orthonormal", "basis", f"rows must be orthonormal, off by {error:.1e}"


def _gate_rules(edit: Gate, _: Widths, fields: dict[str, Array]) -> Iterator[Broken]:
    if edit.normalise and (zeros := int((fields["norm_weight"] == 0).sum())):
        yield "norm_weight", "norm_weight", f"{zeros} weights are zero, which nothing can be divided by"


def _delta_rules(edit: WeightDelta, widths: Widths, fields: dict[str, Array]) -> Iterator[Broken]:
    if edit.count is None:
        return
    rows, columns = fields["rows"].astype(np.int64), fields["columns"].astype(np.int64)
    sizes = {"rows": widths.of(Site.parse(edit.site).point), "columns": widths.of(Site.parse(edit.reads).point)}
    outside = False
    for field, indices in (("rows", rows), ("columns", columns)):
        if ((indices < 0) | (indices >= sizes[field])).any():
            outside = True
            yield "index", field, f"expected 0 to {sizes[field] - 1}, found {indices.min()} to {indices.max()}"
    if not outside and (np.diff(rows * sizes["columns"] + columns) <= 0).any():
        yield "index", "rows", "expected each pair once, in order of row and column"


_NUMBER_RULES: dict[str, NumberRules] = {
    "subspace_filter": _filter_rules,
    "gate": _gate_rules,
    "weight_delta": _delta_rules,
}
"""What the numbers of a kind must satisfy, once they have their shapes."""
