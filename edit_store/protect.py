"""Attention heads that no edit may touch, and the edits of a bundle that touch one.

A search for heads writes the list (`protect.json`): the query heads that a behaviour, such as refusal, needs most. An
edit touches a head if it

    changes its queries (q.proj, q.out) or its output (attn.z), or the keys or values that it attends to, which it
    shares with the other heads of its group (k.proj, k.out, v.out)
    adds something that depends on its output: at attn.out, or to another head's output

The numbers decide, and no kind is known by name: each edit is applied to random vectors, and what moves is what it
changes. An edit that fires for few tokens may fire for none of these, so there all of its numbers count. Edits of the
stream change what every head reads; they are not judged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.bundle import Bundle
from vllm_edits.edit_store.canonical import Digest
from vllm_edits.edit_store.edits import Array, Edit, Fields, ReadingEdit
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.record import FrozenRecord, field_reasons
from vllm_edits.edit_store.sites import Site, Widths

OUTPUT = "attn.z"
"""point with the outputs of all heads"""
_SCALES = (1.0, 1e3)
"""sizes of the vectors that edits are applied to"""
_ROWS = 4
"""vectors of each size"""
_ROUNDING = 1e-6
"""relative error of a vector in float32"""


class ProtectedHead(FrozenRecord):
    """A query head, with the score that it was found by."""

    layer: int = Field(ge=0)
    head: int = Field(ge=0)
    score: float | None = Field(default=None, allow_inf_nan=False)

    def __str__(self) -> str:
        return f"layer {self.layer}, head {self.head}"


class Protect(FrozenRecord):
    """A list of heads of one model."""

    schema_version: Literal[1] = 1
    base: dict[str, Digest] = Field(min_length=1)
    """digests of the model's files"""
    source: str = ""
    """the method that found them"""
    heads: tuple[ProtectedHead, ...] = Field(min_length=1)

    @classmethod
    def load(cls, path: Path) -> Protect:
        """Read a list. BundleRefused lists every invalid field."""
        what = f"the list of heads {path}"
        try:
            return cls.model_validate(json.loads(path.read_bytes()))
        except OSError as error:
            raise BundleRefused(what, [Reason("no_file", f"{error.strerror}. Name a protect.json")]) from None
        except ValidationError as error:
            raise BundleRefused(what, field_reasons(error)) from None
        except (ValueError, RecursionError) as error:
            raise BundleRefused(what, [Reason("not_json", f"expected JSON, found: {error}")]) from None

    def misfits(self, base: BaseModelRef) -> list[Reason]:
        """Reasons why this is no list for that model: it is for another one, or it has heads which that lacks."""
        if self.base != base.files:
            names = sorted(self.base.keys() | base.files.keys())
            differing = [name for name in names if self.base.get(name) != base.files.get(name)]
            return [Reason(
                "base_model", f"the list of protected heads is for another model than {base.name}: "
                f"{', '.join(differing)} differ(s). Give the list of this one",
            )]  # fmt: skip
        widths = base.widths
        return [
            Reason("no_head", f"{head}: the model has layers 0 to {widths.layers - 1}, heads 0 to {widths.heads - 1}")
            for head in self.heads if head.layer >= widths.layers or head.head >= widths.heads
        ]  # fmt: skip

    def check(self, bundle: Bundle) -> None:
        """BundleRefused lists every protected head that an edit of the bundle touches, with these edits."""
        if reasons := touched(bundle, self):
            raise BundleRefused(f"bundle {bundle.manifest.name!r} {bundle.version[:12]}", reasons)


def touched(bundle: Bundle, protect: Protect) -> list[Reason]:
    """The protected heads that a bundle touches, each with the edits; or why the list does not fit its model."""
    tensors, base = verify.check(bundle), bundle.manifest.base
    if reasons := protect.misfits(base):
        return reasons
    by: dict[ProtectedHead, list[str]] = {head: [] for head in protect.heads}
    for edit in bundle.manifest.edits:
        for head in _touched_by(edit, edit.numbers(tensors, base.widths), protect.heads, base.widths):
            by[head].append(f"{edit.kind} at {edit.label}")
    found = f", found by {protect.source}" if protect.source else ""
    return [
        Reason("protected_head", f"{head} is protected{found}, and would be changed by {' and '.join(edits)}")
        for head, edits in by.items() if edits
    ]  # fmt: skip


def _touched_by(
    edit: Edit, fields: Fields, heads: Sequence[ProtectedHead], widths: Widths
) -> Iterator[ProtectedHead]:  # fmt: skip
    site = Site.parse(edit.site)
    near = [head for head in heads if head.layer == site.layer]
    count, reads_output = widths.heads_at(site.point), Site.parse(edit.source).point == OUTPUT
    if not near or not (count or reads_output):
        return
    changed = _changed(edit, fields, widths)
    for head in near:
        own = _part(head.head, widths)
        shared = _part(head.head * count // widths.heads, widths) if count else own
        if (count and changed[shared].any()) or (reads_output and _depends(edit, fields, own, widths)):
            yield head


def _part(head: int, widths: Widths) -> slice:
    return slice(head * widths.head_dim, (head + 1) * widths.head_dim)


def _changed(edit: Edit, fields: Fields, widths: Widths) -> Any:
    """Coordinates of the site that the edit moves for some vector, as booleans [width]."""
    constant = edit.adds(fields) if edit.fires or not isinstance(edit, ReadingEdit) else None
    found = np.zeros(widths.of(Site.parse(edit.site).point), dtype=bool)
    if constant is not None:
        found |= np.any(constant != 0, axis=0)
    for x in _vectors(edit, widths):
        added = _added(edit, fields, x, widths)
        found |= np.any(np.abs(added) > _noise(edit, fields, x, added), axis=0)
    return found


def _depends(edit: Edit, fields: Fields, part: slice, widths: Widths) -> bool:
    """True if the vector that the edit adds depends on this part of the vector that it reads."""
    if edit.fires:
        width, written = widths.of(Site.parse(edit.source).point), edit.adds(fields)
        matrices = [field for field in fields.values() if field.ndim == 2 and field.shape[1] == width]
        return any(np.any(field[:, part]) for field in matrices if field is not written)
    for x in _vectors(edit, widths):
        alone = np.zeros_like(x)
        alone[:, part] = x[:, part]
        with_it, without = (_added(edit, fields, each, widths) for each in (alone, np.zeros_like(x)))
        bound = _ROUNDING * np.abs(without).max() + _noise(edit, fields, alone, with_it)
        if np.any(np.abs(with_it - without) > bound):
            return True
    return False


def _vectors(edit: Edit, widths: Widths) -> Iterator[Array]:
    """Random vectors [rows, in] that the edit may read, of each size."""
    random, width = np.random.default_rng(0), widths.of(Site.parse(edit.source).point)
    for scale in _SCALES:
        yield (scale * random.normal(size=(_ROWS, width))).astype(np.float32)


def _added(edit: Edit, fields: Fields, x: Array, widths: Widths) -> Array:
    """The vectors [rows, width] that the edit adds at its site, having read x."""
    kind: Any = edit
    with np.errstate(all="ignore"):
        if isinstance(edit, ReadingEdit):
            nothing = np.zeros((len(x), widths.of(Site.parse(edit.site).point)), dtype=np.float32)
            added: Array = kind.apply(x, nothing, **fields)
        else:
            added = kind.apply(x, **fields) - x
        found: Array = np.asarray(np.nan_to_num(added), dtype=np.float32)
    return found


def _noise(edit: Edit, fields: Fields, x: Array, added: Array) -> float:
    """Bound of the rounding errors in what was added: none where it was computed by itself."""
    if isinstance(edit, ReadingEdit):
        return 0.0
    return _ROUNDING * max(float(np.abs(each).max()) for each in (x, x + added, *fields.values()))
