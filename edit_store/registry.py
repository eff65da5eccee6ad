"""Things known by name, to which others may add: kinds of edit, their formulas and slots, architectures."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Things of one sort by name, in the order of `key`; without one, in the order in which they were registered."""

    def __init__(self, sort: str, key: Callable[[T], Any] | None = None) -> None:
        """sort: what they are, for errors"""
        self._sort = sort
        self._key = key
        self._known: dict[str, T] = {}

    def add(self, name: str, thing: T) -> None:
        """Register a thing, which may be done again. ValueError when another one has the name."""
        if self._known.get(name, thing) != thing:
            raise ValueError(f"{self._sort} {name!r} is registered already, as {self._known[name]!r}")
        known = {**self._known, name: thing}
        order = known if self._key is None else sorted(known, key=lambda each: (self._key(known[each]), each))  # type: ignore[misc]
        self._known = {each: known[each] for each in order}

    @contextmanager
    def temporarily(self) -> Iterator[None]:
        """Inside, more may be registered; afterwards all that was is forgotten."""
        before = self._known
        try:
            yield
        finally:
            self._known = before

    def __getitem__(self, name: str) -> T:
        if name not in self._known:
            raise KeyError(f"{self._sort} {name!r} is not registered; known: {', '.join(self._known)}")
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def import_modules(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that each registers what it defines: a new module is found by itself."""
    for found in pkgutil.iter_modules(path):
        import_module(f"{package}.{found.name}")
