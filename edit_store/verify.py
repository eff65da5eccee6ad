"""Every rule that a bundle must keep, at publishing and at serving. All broken rules are told together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from vllm_edits.edit_store import tensor_file
from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.bundle import BlobRef, Bundle, Manifest, Strength
from vllm_edits.edit_store.edits import Edit, Tensors
from vllm_edits.edit_store.errors import BundleRefused, Reason, UnsupportedHost
from vllm_edits.edit_store.refs import JOIN
from vllm_edits.edit_store.sites import Site, Widths


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
    reasons += _probe_rules(manifest)
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


def _probe_rules(manifest: Manifest) -> Iterator[Reason]:
    vocab = manifest.base.widths.vocab
    bounds = manifest.strength or Strength(minimum=1, maximum=1)
    for number, probe in enumerate(manifest.probes):
        if (token := probe.highest_token()) >= vocab:
            yield Reason("probe", f"probe {number}: token {token}, the model has 0 to {vocab - 1}")
        if not bounds.minimum <= probe.strength <= bounds.maximum:
            yield Reason("probe", f"probe {number}: strength {probe.strength:g}, requests may ask for {bounds}")


def base_mismatch(built_for: BaseModelRef, served: BaseModelRef) -> list[Reason]:
    """Reasons why a bundle that was built for one model must not be applied to another."""
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
    """Reasons why these edits cannot be at their sites in that model, their numbers aside."""
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
        if not edit.scope.everything and edit.only_in_weights:
            reasons.append(Reason("scope", f"{edit.kind} at {edit.site}: a weight has no scope"))
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
    yield from edit.rules_of_model(base, architecture)
    point = Site.parse(edit.site).point
    if architecture.qk_norm and point in ("q.out", "k.out") and edit.source != edit.site:
        yield Reason(
            "site",
            f"{edit.kind} from {edit.source} to {edit.site}: in {base.architecture} a norm stands between the two, "
            f"so it would be no update of the projection. Write to {edit.site.removesuffix('out')}proj",
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
                broken = edit.rules_of_numbers(fields, widths)
                reasons += [Reason(code, f"{edit.tensor_name(field)}: {why}") for code, field, why in broken]
    return reasons


def _shape_rules(edit: Edit, widths: Widths, tensors: Tensors) -> Iterator[Reason]:
    for field, shape in edit.shapes(widths).items():
        name = edit.tensor_name(field)
        if name not in tensors:
            yield Reason("missing_tensor", f"tensor {name} of shape {list(shape)} is missing.{edit.hint(field)}")
        elif tensors[name].shape != shape:
            found = list(tensors[name].shape)
            hint = ""
            if widths.heads_at(Site.parse(edit.site).point) == widths.kv_heads != widths.heads and found == [
                widths.heads
            ]:
                hint = f". Keys and values have {widths.kv_heads} heads here, not the {widths.heads} of the queries"
            yield Reason("shape", f"tensor {name}: expected {list(shape)}, found {found}{hint}")
