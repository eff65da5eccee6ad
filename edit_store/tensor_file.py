"""Reads a bundle's safetensors bytes without trusting them: first the size limits, then structure and numbers.

The format is 8 bytes of header length (little endian), a JSON header, and raw data. Only float32 is accepted, and
int32 for fields of indices.
"""

from __future__ import annotations

import json
import math
import mmap
from typing import Any

import numpy as np

from vllm_edits.edit_store.edits import Tensors
from vllm_edits.edit_store.errors import Reason
from vllm_edits.edit_store.kinds import KINDS

MAX_HEADER_BYTES = 1 << 20
MAX_TENSOR_FILE_BYTES = 1 << 30
_DTYPES = {"F32": "<f4", "I32": "<i4"}
_ITEM_BYTES = 4


def read(data: bytes | mmap.mmap) -> tuple[Tensors, list[Reason]]:
    """Read the tensors by name, and every reason to refuse them. The arrays are views of `data`: nothing is copied."""
    header, body, reasons = _header(data)
    if reasons:
        return {}, reasons
    tensors: Tensors = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        reason, span = _span(name, entry, len(body))
        if reason is not None:
            reasons.append(reason)
            continue
        spans.append(span)
        array = np.frombuffer(body[span[0] : span[1]], dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if not np.isfinite(array).all():
            reasons.append(Reason("not_finite", f"tensor {name} holds NaN or infinity"))
        tensors[name] = array
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            reasons.append(Reason("tensor_file", f"tensors overlap or leave a gap at byte {min(begin, position)}"))
            break
        position = end
    else:
        if position != len(body) and not reasons:
            reasons.append(Reason("tensor_file", f"expected {position} bytes of data, found {len(body)}"))
    return tensors, reasons


def _header(data: bytes | mmap.mmap) -> tuple[dict[str, Any], memoryview, list[Reason]]:
    nothing = memoryview(b"")
    if len(data) > MAX_TENSOR_FILE_BYTES:
        return {}, nothing, [Reason("too_large", f"tensor file of {len(data)} bytes, at most {MAX_TENSOR_FILE_BYTES}")]
    if len(data) < 8:
        return {}, nothing, [Reason("tensor_file", f"truncated: {len(data)} bytes are not a safetensors file")]
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        return {}, nothing, [Reason("too_large", f"safetensors header of {length} bytes, at most {MAX_HEADER_BYTES}")]
    if 8 + length > len(data):
        return {}, nothing, [Reason("tensor_file", f"truncated: header of {length} bytes in {len(data)} bytes")]
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        return {}, nothing, [Reason("tensor_file", f"safetensors header is not JSON: {error}")]
    if not isinstance(header, dict):
        return {}, nothing, [Reason("tensor_file", "safetensors header is not a JSON object")]
    header.pop("__metadata__", None)
    return header, memoryview(data)[8 + length :], []


def _span(name: str, entry: Any, size: int) -> tuple[Reason | None, tuple[int, int]]:
    """The range of a tensor's bytes, or the reason to refuse its header entry."""

    def is_counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(count) is int and count >= 0 for count in value)

    def refuse(message: str, code: str = "tensor_file") -> tuple[Reason, tuple[int, int]]:
        return Reason(code, f"tensor {name}: {message}"), (0, 0)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return refuse("expected dtype, shape and data_offsets")
    field = name.rpartition("/")[2]
    expected_type = "I32" if any(field in kind.integers for kind in KINDS.values()) else "F32"
    if entry["dtype"] != expected_type:
        return refuse(f"expected dtype {expected_type}, found {entry['dtype']!r}", "dtype")
    if not is_counts(entry["shape"]) or len(entry["shape"]) > 4 or 0 in entry["shape"]:
        return refuse(f"expected a shape of 1 to 4 positive sizes, found {entry['shape']!r}")
    offsets = entry["data_offsets"]
    if not is_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        return refuse(f"data offsets {offsets!r} do not lie in {size} bytes of data (truncated?)")
    expected = math.prod(entry["shape"]) * _ITEM_BYTES
    if offsets[1] - offsets[0] != expected:
        return refuse(f"shape {entry['shape']} needs {expected} bytes, found {offsets[1] - offsets[0]}")
    return None, (offsets[0], offsets[1])
