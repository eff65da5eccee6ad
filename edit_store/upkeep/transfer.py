"""Moves versions between stores, directly or as one file for a site without a network.

An exported file is an uncompressed tar archive. The same version gives the same bytes. Its files are:

    published.json        the record: name, version, label, who, when
    manifest.json         its sha256 is the version
    edits.safetensors     its sha256 is in the manifest
    attestations/<n>.json signatures, as stored
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.bundle import MANIFEST_FILE, MAX_MANIFEST_BYTES, TENSORS_FILE, Bundle, Manifest
from vllm_edits.edit_store.canonical import canonical_json
from vllm_edits.edit_store.errors import BundleRefused, EditsError, Reason
from vllm_edits.edit_store.progress import StepDone
from vllm_edits.edit_store.refs import Ref
from vllm_edits.edit_store.signing import MAX_ENVELOPE_BYTES, read_envelopes
from vllm_edits.edit_store.storage.store import EditStore, Published
from vllm_edits.edit_store.tensor_file import MAX_TENSOR_FILE_BYTES

RECORD_FILE, ATTESTATIONS = "published.json", "attestations/"
MAX_ATTESTATIONS = 100
MAX_RECORD_BYTES = 1 << 16
SUFFIX = ".edits.tar"
_LIMITS = {RECORD_FILE: MAX_RECORD_BYTES, MANIFEST_FILE: MAX_MANIFEST_BYTES, TENSORS_FILE: MAX_TENSOR_FILE_BYTES}
_ATTESTATION = re.compile(rf"{ATTESTATIONS}[0-9]{{3}}\.json")


@dataclass(frozen=True)
class Package:
    """All files of a version, for another store."""

    bundle: Bundle
    record: Published
    envelopes: tuple[bytes, ...]

    @classmethod
    def of(cls, store: EditStore, reference: str, progress: Callable[[int], None] = lambda _: None) -> Package:
        """Read and check a version of a store. `progress` is called with the size of each piece that arrived."""
        name, version = Ref.parse(reference).name, store.resolve(reference)
        bundle = store.with_tensors(version, store.manifest(version), progress)
        verify.check(bundle)
        return cls(bundle, store.record(name, version), tuple(store.attestations(version)))

    @classmethod
    def of_members(cls, members: Mapping[str, bytes], what: str) -> Package:
        """Check files that came from elsewhere. They are not trusted: every digest is computed."""
        missing = [name for name in _LIMITS if name not in members]
        if missing:
            raise BundleRefused(
                what, [Reason("archive", f"expected {', '.join(_LIMITS)} in it; missing: {', '.join(missing)}")]
            )
        reasons: list[Reason] = []
        bundle: Bundle | None = None
        record: Published | None = None
        try:
            manifest = Manifest.from_bytes(members[MANIFEST_FILE], f"{what}: {MANIFEST_FILE}")
            bundle = Bundle(manifest, members[TENSORS_FILE])
            verify.check(bundle)
        except BundleRefused as refused:
            reasons += refused.reasons
        try:
            record = Published.model_validate_json(members[RECORD_FILE])
        except ValidationError as error:
            wrong = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            reasons.append(Reason("archive", f"{RECORD_FILE}: {'; '.join(wrong)}"))
        if bundle is not None and record is not None:
            found = (bundle.manifest.name, bundle.version, bundle.manifest.label)
            told = (record.name, record.version, record.label)
            if found != told:
                reasons.append(
                    Reason("archive", f"{RECORD_FILE} is about {_called(*told)}, but the bundle is {_called(*found)}")
                )
        if bundle is None or record is None or reasons:
            raise BundleRefused(what, reasons)
        envelopes = (data for name, data in sorted(members.items()) if name.startswith(ATTESTATIONS))
        return cls(bundle, record, tuple(data for data in envelopes if read_envelopes([data])))

    def members(self) -> dict[str, bytes]:
        """The files of a version outside a store, by name. The same version gives the same bytes."""
        if len(self.envelopes) > MAX_ATTESTATIONS:
            raise EditsError(
                f"{self.record.name}@{self.record.version[:12]} has {len(self.envelopes)} signatures, but at most "
                f"{MAX_ATTESTATIONS} can be transferred. Delete some from the store first"
            )
        return {
            RECORD_FILE: canonical_json(self.record.model_dump(mode="json")),
            MANIFEST_FILE: self.bundle.manifest.to_bytes(),
            TENSORS_FILE: bytes(self.bundle.tensor_bytes),
            **{attestation_name(number): data for number, data in enumerate(sorted(self.envelopes))},
        }

    def put(self, store: EditStore) -> str:
        """Write the version into a store; returns its digest. Writing it again is harmless."""
        store.put_version(self.bundle, self.envelopes, self.record)
        return self.bundle.version


def copy(
    source: EditStore, target: EditStore, references: list[str], progress: StepDone = lambda *_: None
) -> list[str]:
    """Copy versions with their records and signatures; returns `name@version` of each. Tags are not copied."""
    total = sum(source.manifest(source.resolve(reference)).tensors.size for reference in references)
    copied, done = [], 0
    for reference in references:

        def arrived(size: int, what: str = reference) -> None:
            nonlocal done
            done += size
            progress(what, done, total)

        progress(reference, done, total)
        package = Package.of(source, reference, arrived)
        copied.append(f"{package.record.name}@{package.put(target)}")
    return copied


def attestation_name(number: int) -> str:
    """Name of the file that holds a signature."""
    return f"{ATTESTATIONS}{number:03}.json"


def member_limit(name: str) -> int | None:
    """The largest size of the file with this name, or None if no file has this name."""
    return MAX_ENVELOPE_BYTES if _ATTESTATION.fullmatch(name) else _LIMITS.get(name)


def _called(name: str, version: str, label: str) -> str:
    return f"{name}@{version[:12]} labelled {label!r}"


def export(store: EditStore, reference: str, path: Path) -> str:
    """Write a version into one file; returns its digest. An existing file is never overwritten."""
    package = Package.of(store, reference)
    try:
        with path.open("xb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in package.members().items():
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o644
                archive.addfile(member, io.BytesIO(data))
    except FileExistsError:
        raise EditsError(f"{path} exists already and is not overwritten. Choose another file name") from None
    except OSError as error:
        path.unlink(missing_ok=True)
        raise EditsError(f"{path} cannot be written: {error.strerror}") from None
    return package.bundle.version


def read_export(path: Path) -> Package:
    """Read and check an exported file. Every size is checked before the file is read."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            members = _read_members(archive, str(path))
    except (OSError, tarfile.TarError, EOFError) as error:
        raise BundleRefused(
            str(path), [Reason("archive", f"expected a file written by `vllm-edits export`, found: {error}")]
        ) from None
    return Package.of_members(members, str(path))


def _read_members(archive: tarfile.TarFile, what: str) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for member in archive:
        limit = member_limit(member.name)
        if limit is None or not member.isfile() or member.name in members:
            raise BundleRefused(what, [Reason("archive", f"unexpected file {member.name!r} in the archive")])
        if member.size > limit:
            raise BundleRefused(
                what, [Reason("too_large", f"{member.name}: expected at most {limit} bytes, found {member.size}")]
            )
        if len(members) >= MAX_ATTESTATIONS + len(_LIMITS):
            raise BundleRefused(
                what, [Reason("archive", f"expected at most {MAX_ATTESTATIONS} signatures, found more")]
            )
        file = archive.extractfile(member)
        members[member.name] = file.read() if file is not None else b""
    return members
