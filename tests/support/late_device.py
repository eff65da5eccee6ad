"""A device that does what it is asked as late as it may: when somebody waits for it. It stands for a GPU's stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_edits.plugin.graph.device_rows import DeviceRows, PinnedTurns


class LateDevice:
    """Copies that are not waited for read their source when they are made, not when they are asked for."""

    def __init__(self) -> None:
        self._todo: deque[Callable[[], Any]] = deque()
        self.waits = 0
        """how often the host waited"""
        self.copies = 0

    def ask(self, act: Callable[[], Any]) -> None:
        self._todo.append(act)

    def work(self, last: Callable[[], Any] | None = None) -> None:
        """Do what was asked, all of it or up to `last`."""
        while self._todo:
            act = self._todo.popleft()
            act()
            if act is last:
                return

    def is_done(self, act: Callable[[], Any]) -> bool:
        return act not in self._todo

    def snapshot(self, tensor: Tensor, keep: Callable[[Tensor], None]) -> None:
        """Have what the tensor holds at this point of the stream kept, as a kernel behind it would read it."""
        self.ask(lambda: keep(tensor.clone()))

    def rows(self, tensor: Tensor, neutral: float) -> DeviceRows:
        """`DeviceRows` of a tensor that lies on this device."""
        late: Any = _LateTensor(self, tensor)
        turns = PinnedTurns(late, pinned_like=lambda like: torch.empty(like.shape, dtype=like.dtype),
                            event=lambda: _LateEvent(self))  # fmt: skip
        return DeviceRows(tensor, neutral, turns)


class _LateTensor:
    def __init__(self, device: LateDevice, tensor: Tensor) -> None:
        self._device, self._tensor = device, tensor
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def __getitem__(self, rows: Any) -> _LateTensor:
        return _LateTensor(self._device, self._tensor[rows])

    def copy_(self, source: Tensor, *, non_blocking: bool) -> None:
        assert non_blocking
        self._device.copies += 1
        self._device.ask(lambda: self._tensor.copy_(source))


class _LateEvent:
    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self._reached: Callable[[], Any] = lambda: None

    def record(self) -> None:
        self._reached = lambda: None
        self._device.ask(self._reached)

    def query(self) -> bool:
        return self._device.is_done(self._reached)

    def synchronize(self) -> None:
        self._device.waits += 1
        self._device.work(self._reached)
