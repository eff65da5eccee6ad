"""The scopes of every slot as arrays, so that a whole batch takes a few operations.

A step's cost does not depend on the number of slots with scopes, nor on the number of different scopes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_edits.edit_store.scope import Scope

_EVER = np.iinfo(np.int64).max // 2
_ID_BITS, _ID_MASK = 32, 0x7FFFFFFF


class ScopeTables:
    """For slot s and scope row r, the covered positions: below `head`, and from `begin` up to `end`, counted from the
    prompt's end. Rows without a scope cover everything."""

    def __init__(self, scopes: Mapping[int, Sequence[Scope]], slots: int, scope_rows: int) -> None:
        """scopes: by slot, the first has scope row 1"""
        self._head = np.zeros((slots + 1, scope_rows), dtype=np.int64)
        self._begin = np.full((slots + 1, scope_rows), -_EVER)
        self._end = np.full((slots + 1, scope_rows), _EVER)
        self._named: dict[tuple[int, int], tuple[int, ...]] = {}
        """the token ids of a slot's scope row, if it names any"""
        for slot, own in scopes.items():
            for scope_row, scope in enumerate(own, 1):
                self._put((slot, scope_row), scope)
        self.names_ids = np.zeros(slots + 1, dtype=bool)
        """[S]: True if any scope of a slot names token ids"""
        self.names_ids[[slot for slot, _ in self._named]] = True
        self.named = np.zeros((slots + 1, scope_rows), dtype=bool)
        """[S, scope rows]: True if a slot's scope row names token ids"""
        for at in self._named:
            self.named[at] = True

    def _put(self, at: tuple[int, int], scope: Scope) -> None:
        if scope.windowed:
            self._head[at], self._begin[at], self._end[at] = scope.first or 0, -(scope.last or 0), 0
        elif scope.segment == "prompt":
            self._end[at] = 0
        elif scope.segment == "generated":
            self._begin[at] = 0
        if scope.tokens is not None:
            self._named[at] = scope.tokens

    def covered(self, slots: NDArray[Any], positions: NDArray[Any], prompts: NDArray[Any]) -> NDArray[np.bool_]:
        """[T, scope rows]: True for each token that is covered, as far as its position decides.

        slots, positions and lengths of prompts are [T].
        """
        at, length = positions[:, None], prompts[:, None]
        behind = at - length
        in_head = at < np.minimum(self._head[slots], length)
        covered: NDArray[np.bool_] = in_head | ((behind >= self._begin[slots]) & (behind < self._end[slots]))
        return covered

    def named_ids(self, device: torch.device) -> NamedIds:
        """The lookup of token ids, on the device, where the ids are."""
        slots, scope_rows = self._head.shape
        base = np.full((slots, scope_rows), -1, dtype=np.int64)
        keys = [np.array([-1, np.iinfo(np.int64).max])]
        for number, ((slot, scope_row), ids) in enumerate(self._named.items()):
            base[slot, scope_row] = number << _ID_BITS
            keys.append(np.array(ids, dtype=np.int64) | base[slot, scope_row])
        return NamedIds(_sent(base, device), _sent(np.sort(np.concatenate(keys)), device))


class NamedIds:
    """Finds on the device the tokens whose id is named by their slot's scope.

    A key stands for a scope and an id. The named keys are sorted, so each token is looked up by bisection. A scope that
    names no ids has the key -1, which is always found.
    """

    def __init__(self, base: Tensor, keys: Tensor) -> None:
        """base: [S, scope rows], the first key of a scope; keys: [N], sorted, the last met by no token"""
        self._base = base
        self._keys = keys

    def met(self, slots: Tensor, ids: Tensor) -> Tensor:
        """[T, scope rows] of bool, for tokens with these slots and ids, [T]."""
        asked = self._base[slots] | (ids & _ID_MASK).unsqueeze(-1)  # -1, as in some placeholders, is no id
        return self._keys[torch.searchsorted(self._keys, asked)] == asked


def _sent(values: NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
