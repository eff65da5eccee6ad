"""What an answer's log-probabilities are compared by."""

from __future__ import annotations

from typing import Any

from vllm_edits.edit_store import Bundle, check


def pairs_of(bundle: Bundle) -> list[Any]:
    tensors = check(bundle)
    widths = bundle.manifest.base.widths
    return [
        (edit, {field: array.copy() for field, array in edit.numbers(tensors, widths).items()})
        for edit in bundle.manifest.edits
    ]
