"""Leave in a CUDA library only the machine code of one GPU generation; every offset in the file stays what it was.

A library holds, for each of its source files, a container with the same kernels compiled for several architectures. The
driver looks for the entry of its own. So the entries of the architecture are moved to the front of their container,
which is told to end after them, and what follows becomes zeros, which compress to nothing. A container without such
an entry keeps the smallest entry of the library, of another architecture and without kernels: what the driver then says
of it ("no kernel image") is what it says of such a container today.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONTAINER, ELF_CODE = 0xBA55ED50, 2


@dataclass(frozen=True)
class Entry:
    """One image in a container: of which kind, for which architecture, and where."""

    kind: int
    architecture: int
    begin: int
    end: int


def section(data: bytes, name: bytes) -> tuple[int, int]:
    """Begin and end of a section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + each * size) for each in range(count)]
    for header in headers:
        at = headers[names][4] + header[0]
        if data[at : data.index(b"\0", at)] == name:
            return header[4], header[4] + header[5]
    raise SystemExit(f"no section {name.decode()}: this is no CUDA library")


def containers(data: bytes) -> Iterator[tuple[int, int, int, list[Entry]]]:
    """Where each container begins, where its entries begin and end, and the entries."""
    at, last = section(data, b".nv_fatbin")
    while at < last:
        magic, _, header, size = struct.unpack_from("<IHHQ", data, at)
        if magic != CONTAINER:  # filling between two containers
            at += 8
            continue
        entries, here, end = [], at + header, at + header + size
        while here < end:
            kind, _, own, payload = struct.unpack_from("<HHIQ", data, here)
            (architecture,) = struct.unpack_from("<I", data, here + 28)
            entries.append(Entry(kind, architecture, here, here + own + payload))
            here += own + payload
        if here != end:
            raise SystemExit(f"the container at {at:#x} is not laid out as known")
        yield at, at + header, end, entries
        at = end


def slim(path: Path, architecture: int) -> str:
    """Do it; says what was left."""
    data = path.read_bytes()
    found = list(containers(data))
    everything = [entry for *_, entries in found for entry in entries]
    others = [entry for entry in everything if (entry.kind, entry.architecture) != (ELF_CODE, architecture)]
    if not others:
        return f"{path.name}: nothing but sm_{architecture}, left as it is"
    spare = min(others, key=lambda entry: entry.end - entry.begin)
    made, left, empty = bytearray(data), 0, 0
    for at, begin, end, entries in found:
        own = [entry for entry in entries if (entry.kind, entry.architecture) == (ELF_CODE, architecture)]
        kept = b"".join(data[entry.begin : entry.end] for entry in own or [spare])
        if len(kept) > end - begin:
            raise SystemExit(f"the container at {at:#x} has no room for {len(kept)} bytes")
        struct.pack_into("<Q", made, at + 8, len(kept))
        made[begin:end] = kept.ljust(end - begin, b"\0")
        left, empty = left + len(kept), empty + (not own)
    path.write_bytes(made)
    all_bytes = sum(entry.end - entry.begin for entry in everything)
    return (
        f"{path.name}: {left >> 10} KiB of {all_bytes >> 10} left, {empty} of {len(found)} containers without "
        f"sm_{architecture}"
    )
