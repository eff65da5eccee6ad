"""A measure: options, the data that it wants, and how it compares an edited model with its base model.

A measure is one module in `measures/`, which is found without a list: a subclass of `Measure`, and its registration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from vllm_edits.edit_store.authoring.data import Data, Table
from vllm_edits.edit_store.evaluation.figure import Figure
from vllm_edits.edit_store.evaluation.speaker import Speaker
from vllm_edits.edit_store.record import FrozenRecord
from vllm_edits.edit_store.registry import Registry


class Measure(FrozenRecord):
    """A measure. The fields of a subclass are its options; its docstring is its help."""

    tables: ClassVar[Mapping[str, Table]]
    """the data that it wants"""

    @classmethod
    def called(cls) -> str:
        """Name in suites, and first word of its figures: that of its module."""
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    def figures(self, base: Speaker, edited: Speaker, data: Data) -> Iterator[Figure]:
        """The figures on these data."""
        raise NotImplementedError


MEASURES: Registry[type[Measure]] = Registry("measure", key=lambda measure: measure.called())
"""By the name in suites."""
