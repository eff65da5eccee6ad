"""What the host writes for the device: right at every point of its stream, however late it works."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.fakes import cheaply
from tests.support.late_device import LateDevice
from vllm_edits.plugin.graph import device_rows
from vllm_edits.plugin.graph.device_rows import TURNS, DeviceRows

ROWS = 8
writes = st.lists(st.lists(st.integers(1, 9), max_size=ROWS), min_size=1, max_size=12)


def expected(values: list[int]) -> list[int]:
    return values + [0] * (ROWS - len(values))


@cheaply
@given(writes)
def test_rows_are_what_was_written_last_and_neutral_behind(written: list[list[int]]) -> None:
    tensor = torch.zeros(ROWS, dtype=torch.int32)
    rows = DeviceRows(tensor, 0)
    for values in written:
        rows.write(np.array(values, dtype=np.int32))
        assert tensor.tolist() == expected(values)


def what_the_device_reads(written: list[list[int]]) -> list[list[int]]:
    """Behind each write, where nobody waits for the device but who needs a buffer back."""
    device, tensor, read = LateDevice(), torch.zeros(ROWS, dtype=torch.int32), list[Tensor]()
    rows = device.rows(tensor, 0)
    for values in written:
        rows.write(np.array(values, dtype=np.int32))
        device.snapshot(tensor, read.append)
    device.work()
    return [each.tolist() for each in read]


@cheaply
@given(writes)
def test_a_device_that_is_late_reads_what_was_written_for_it(written: list[list[int]]) -> None:
    assert what_the_device_reads(written) == [expected(values) for values in written]


def test_a_buffer_that_is_written_to_too_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control: with one buffer that nobody waits for, the device reads what was meant for later steps."""
    monkeypatch.setattr(device_rows.PinnedTurns, "begin", lambda turns, rows: turns._buffers[0].pinned.numpy()[:rows])
    written = [[1], [2], [3]]
    assert what_the_device_reads(written) != [expected(values) for values in written]


def test_a_step_waits_for_no_copy_that_two_steps_before_it_is_done() -> None:
    """As on a GPU, where at most two steps are under way; with more of them it waits, and stays right."""
    device, tensor = LateDevice(), torch.zeros(ROWS, dtype=torch.int32)
    rows = device.rows(tensor, 0)
    for step in range(1, 10):
        rows.write(np.array([step], dtype=np.int32))
        if step % (TURNS - 1) == 0:
            device.work()
    assert (device.copies, device.waits) == (9, 0)
    for step in range(10, 10 + TURNS + 1):
        rows.write(np.array([step], dtype=np.int32))
    assert device.waits > 0, "positive control"


def test_what_is_there_is_not_sent_again_unless_the_device_wrote_itself() -> None:
    device, tensor = LateDevice(), torch.ones(ROWS)
    rows = device.rows(tensor, 1)
    some = np.array([0.5, 2], dtype=np.float32)
    for _ in range(3):
        rows.write(some)
    assert device.copies == 1
    device.work()
    tensor[:3] = 7
    rows.changed(3)
    rows.write(some)
    device.work()
    assert tensor.tolist() == [0.5, 2, *[1] * (ROWS - 2)]
    rows.write(some[:0])
    rows.write(some[:0])
    device.work()
    assert (tensor.tolist(), device.copies) == ([1] * ROWS, 3)
