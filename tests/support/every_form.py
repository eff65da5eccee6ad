"""Tests of every kind of edit at every site where it has a meaning, in every form."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.proofs.parity import Pair, every_edit
from tests.support.fakes import BASE

FORMS: dict[str, list[Pair]] = {}
"""Edits with random numbers, by kind, form and the point that is read."""
for _label, _pair in every_edit(BASE):
    FORMS.setdefault(_label, []).append(_pair)

PAIRS = [pair for pairs in FORMS.values() for pair in pairs]


def for_every_form(wanted: Callable[[Any], bool] = lambda _edit: True) -> Callable[[Callable[..., None]], Any]:
    """Run a test for each edit, as its argument `pair`: one test item for each form, which goes on after a failed site.

    wanted: tells which edits.
    """
    chosen = {label: [pair for pair in pairs if wanted(pair[0])] for label, pairs in FORMS.items()}
    items = [pytest.param(pairs, id=label) for label, pairs in chosen.items() if pairs]

    def decorate(test: Callable[..., None]) -> Any:
        def loop(*, pairs: Iterable[Pair], **fixtures: Any) -> None:
            failures = []
            for pair in pairs:
                try:
                    test(pair=pair, **fixtures)
                except Exception as failure:  # noqa: BLE001  raised below, with those of other sites
                    failure.add_note(f"at {pair[0].site}")
                    failures.append(failure)
            if failures:
                raise ExceptionGroup(f"{len(failures)} sites", failures)

        names = ["pairs", *(name for name in inspect.signature(test).parameters if name != "pair")]
        functools.update_wrapper(loop, test)
        loop.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        )
        return pytest.mark.parametrize("pairs", items)(loop)

    return decorate
