"""Every form of every kind against transformers with the formula, on a GPU: proofs/parity.py within a few minutes.

    python -m tests.gpu.exact DTYPE [--everywhere] [--weights]

Compiled, each form once, at another site as far as there are; with --everywhere not compiled, every form at every site.
With --weights one after the other in the weights, after which these must be what they were.
Where kernels compute nothing, the errors are told and mean nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tests.proofs.parity
from tests.gpu.facts import ended, tried
from tests.gpu.story import each_form_once

ARCHITECTURE = "LlamaForCausalLM"


def found(dtype: str, *, everywhere: bool, weights: bool) -> dict[str, Any]:
    """The largest error of each kind, and what is too far off."""
    every = tests.proofs.parity.every_edit

    def once(*arguments: Any, **how: Any) -> Iterator[tuple[str, Any]]:
        edits = list(every(*arguments, **how))
        chosen = {id(pair) for pair in each_form_once(edits)}
        return ((form, pair) for form, pair in edits if id(pair) in chosen)

    if not everywhere:
        tests.proofs.parity.every_edit = once
    findings = tests.proofs.parity.find(ARCHITECTURE, tests.proofs.parity.How(dtype, eager=everywhere, weights=weights))
    worst: dict[str, float] = {}
    for row in findings.rows:
        kind = tests.proofs.parity._kind(row)
        worst[kind] = max(worst.get(kind, 0.0), row.served)
    wrong = [f"{row.kind} at {row.site}: {row.served:.1e}" for row in findings.faults()]
    return {
        "dtype": dtype, "everywhere": everywhere, "weights": weights, "edits": len(findings.rows) - 1,
        "wrong": len(wrong), "first": wrong[:12], "worst": worst,
        "transformers": max(row.rounded for row in findings.rows),
    }  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """The command."""
    wrong: list[int] = []

    def look() -> dict[str, Any]:
        facts = found(arguments[0], everywhere="--everywhere" in arguments, weights="--weights" in arguments)
        wrong.append(facts["wrong"])
        return facts

    worked = tried("exact", look)
    computes = "NULL_GPU" not in os.environ
    ended(worked and not (computes and any(wrong)))


if __name__ == "__main__":
    main(sys.argv[1:])
