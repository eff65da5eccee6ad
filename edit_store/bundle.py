"""The bundle: a frozen manifest and one safetensors file. Its version is the digest of the manifest.

    polite/
      manifest.json       canonical JSON (RFC 8785); sha256 of these bytes is the version
      edits.safetensors   tensors named `<site>/<kind>/<field>`; the manifest contains its sha256

It needs neither torch nor vLLM, and executes nothing that it reads.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import rfc8785
from pydantic import AwareDatetime, Field, ValidationError, model_validator
from safetensors.numpy import save

from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.canonical import Digest, canonical_json, sha256
from vllm_edits.edit_store.edits import Edit, Tensors
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.kinds import AnyEdit
from vllm_edits.edit_store.probes import MAX_PROBES, Probe
from vllm_edits.edit_store.record import FrozenRecord
from vllm_edits.edit_store.refs import MAX_COMPOSED, NAME

SCHEMA_VERSION: Literal[1] = 1
MANIFEST_FILE = "manifest.json"
TENSORS_FILE = "edits.safetensors"
MAX_MANIFEST_BYTES = 1 << 20

Name = Annotated[str, Field(pattern=rf"^{NAME}$")]
BundleName = Annotated[str, Field(pattern=rf"^{NAME}(?:\+{NAME})*$", max_length=MAX_COMPOSED)]


class BlobRef(FrozenRecord):
    """A reference to a stored blob, by its content."""

    sha256: Digest
    size: int = Field(ge=0)

    @classmethod
    def of(cls, data: bytes | mmap.mmap) -> BlobRef:
        return cls(sha256=sha256(data), size=len(data))

    def __str__(self) -> str:
        return f"{self.size} bytes {self.sha256[:12]}"


GATE_FIRINGS = "gate_firings"
"""Name of the measurement: firings of a version's gates per token, prompt and answer included."""


class Measurement(FrozenRecord):
    """A measurement by the author: the same metric without (`base`) and with the edits (`edited`)."""

    metric: str
    base: float
    edited: float
    n: int = Field(gt=0)


class Strength(FrozenRecord):
    """The strengths that a request may ask for. 1 means: the edits as they are written."""

    minimum: float = Field(allow_inf_nan=False)
    maximum: float = Field(allow_inf_nan=False)
    default: float = Field(default=1.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _in_order(self) -> Strength:
        if not self.minimum <= self.default <= self.maximum:
            raise ValueError(f"expected minimum <= default <= maximum, found {self}")
        return self

    def __str__(self) -> str:
        return f"{self.minimum:g} to {self.maximum:g}, by default {self.default:g}"


class Part(FrozenRecord):
    """A bundle in a composition, with the number of edits that come from it."""

    name: Name
    version: Digest
    edits: int = Field(gt=0)


class Provenance(FrozenRecord):
    """The origin of the edits: tool, method, source and parameters."""

    tool: str
    method: str
    source: str = ""
    parameters: dict[str, str] = Field(default_factory=dict)


LATER_FIELDS = ("privileged", "cumulative_edits", "probes")
"""Of a manifest: not written when they have their defaults, so that the version of older bundles stays what it is."""


class Manifest(FrozenRecord):
    """The complete description of a bundle, without its numbers."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: BundleName
    description: str = ""
    label: str = ""
    created_at: AwareDatetime
    base: BaseModelRef
    edits: tuple[AnyEdit, ...] = Field(min_length=1)
    strength: Strength | None = None
    """None: a request cannot ask for another strength"""
    tensors: BlobRef
    provenance: Provenance
    parts: tuple[Part, ...] = ()
    """the bundles of a composition, in the order of its edits; empty for any other bundle"""
    measurements: tuple[Measurement, ...] = ()
    privileged: bool = False
    """True if it takes safety away, so that trust policies refuse it unless they say otherwise"""
    cumulative_edits: int = Field(default=0, ge=0)
    """concepts, facts or behaviours that it changes, those of the bundles below it included; 0: not counted"""
    probes: Annotated[tuple[Probe, ...], Field(max_length=MAX_PROBES)] = ()
    """prompts by which servers tell whether they serve it as it was made"""

    @property
    def gate_firings(self) -> float | None:
        """Firings of its gates per token, if the author has measured them."""
        return next((found.edited for found in self.measurements if found.metric == GATE_FIRINGS), None)

    def to_bytes(self) -> bytes:
        """The canonical bytes whose digest is the version."""
        fields = self.model_dump(mode="json")
        for name in LATER_FIELDS:
            if getattr(self, name) == type(self).model_fields[name].default:
                del fields[name]
        return canonical_json(fields)

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "manifest") -> Manifest:
        """Parse stored bytes. BundleRefused lists every invalid field. Bytes that are not canonical are refused too."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise BundleRefused(
                what, [Reason("too_large", f"expected at most {MAX_MANIFEST_BYTES} bytes, found {len(data)}")]
            )
        try:
            manifest = cls.model_validate(json.loads(data))
        except ValidationError as error:
            raise BundleRefused(what, [_reason(problem) for problem in error.errors()]) from None
        except (ValueError, RecursionError) as error:
            raise BundleRefused(what, [Reason("not_json", f"expected JSON, found: {error}")]) from None
        try:
            canonical = manifest.to_bytes()
        except (rfc8785.CanonicalizationError, ValueError) as error:  # NaN, or an integer beyond 2^53
            raise BundleRefused(
                what,
                [
                    Reason(
                        "not_canonical", f"expected values that canonical JSON (RFC 8785) can express, found: {error}"
                    )
                ],
            ) from None
        if canonical != data:
            raise BundleRefused(
                what, [Reason("not_canonical", "expected canonical JSON (RFC 8785). Publish the bundle again")]
            )
        return manifest


def _reason(problem: Any) -> Reason:
    where = ".".join(str(part) for part in problem["loc"])
    code = {"extra_forbidden": "unknown_field", "union_tag_invalid": "unknown_kind"}.get(problem["type"], "manifest")
    if "unknown site" in problem["msg"]:
        code = "unknown_site"
    return Reason(code, f"{where}: {problem['msg']}")


@dataclass(frozen=True)
class Bundle:
    """A manifest with the bytes of its tensor file. `verify.check` checks them against all rules."""

    manifest: Manifest
    tensor_bytes: bytes | mmap.mmap = field(repr=False)

    @property
    def version(self) -> str:
        """The bundle's identity: sha256 of the canonical manifest."""
        return sha256(self.manifest.to_bytes())

    @classmethod
    def create(
        cls,
        name: str,
        base: BaseModelRef,
        edits: Iterable[tuple[Edit, Mapping[str, Any]]],
        provenance: Provenance,
        *,
        description: str = "",
        label: str = "",
        strength: Strength | None = None,
        parts: tuple[Part, ...] = (),
        measurements: Iterable[Measurement] = (),
        privileged: bool = False,
        cumulative_edits: int = 0,
        probes: Iterable[Probe] = (),
        created_at: datetime | None = None,
    ) -> Bundle:
        """Make a bundle from edits and their arrays by field name. It is not checked here: see `verify.check`."""
        import numpy as np

        pairs = list(edits)
        tensors: Tensors = {}
        for edit, fields in pairs:
            for field_name, array in fields.items():
                dtype = np.int32 if field_name in edit.integers else np.float32
                tensors[edit.tensor_name(field_name)] = np.ascontiguousarray(array, dtype=dtype)
        tensor_bytes = save(
            tensors,
            metadata={"format": "vllm-edits"},  # one key: safetensors writes several in random order
        )
        manifest = Manifest(
            name=name,
            description=description,
            label=label,
            created_at=created_at or datetime.now(UTC).replace(microsecond=0),
            base=base,
            edits=tuple(edit for edit, _ in pairs),
            strength=strength,
            tensors=BlobRef.of(tensor_bytes),
            provenance=provenance,
            parts=parts,
            measurements=tuple(measurements),
            privileged=privileged,
            cumulative_edits=cumulative_edits,
            probes=tuple(probes),
        )
        return cls(manifest, tensor_bytes)

    def with_probes(self, probes: Iterable[Probe]) -> Bundle:
        """The same edits with other probes: another version."""
        return Bundle(self.manifest.model_copy(update={"probes": tuple(probes)}), self.tensor_bytes)

    def save(self, folder: Path) -> None:
        """Write the two files into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TENSORS_FILE).write_bytes(self.tensor_bytes)
        (folder / MANIFEST_FILE).write_bytes(self.manifest.to_bytes())

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read the two files from `folder`. Only the form of the manifest is checked."""
        from vllm_edits.edit_store.tensor_file import MAX_TENSOR_FILE_BYTES

        for name, limit in ((MANIFEST_FILE, MAX_MANIFEST_BYTES), (TENSORS_FILE, MAX_TENSOR_FILE_BYTES)):
            path = folder / name
            if not path.is_file():
                raise BundleRefused(str(folder), [Reason("missing_file", f"expected {name} in {folder}, found none")])
            if path.stat().st_size > limit:
                raise BundleRefused(
                    str(folder),
                    [Reason("too_large", f"expected at most {limit} bytes in {name}, found {path.stat().st_size}")],
                )
        manifest = Manifest.from_bytes((folder / MANIFEST_FILE).read_bytes(), str(folder / MANIFEST_FILE))
        return cls(manifest, (folder / TENSORS_FILE).read_bytes())
