"""The device memory of a capacity, counted by the slot tensors themselves before they are made. Pure."""

from __future__ import annotations

import torch

from vllm_edits.edit_store.sites import Widths
from vllm_edits.plugin.graph.kinds import SLOT_TENSORS
from vllm_edits.plugin.graph.reservation import Capacity, EditGroup, SlotBytes
from vllm_edits.plugin.graph.slot_rows import Layout
from vllm_edits.plugin.graph.slot_tensors import Shape
from vllm_edits.plugin.graph.tensor_parallel import Rank


def slot_bytes(widths: Widths, dtype: torch.dtype, workers: int = 1) -> SlotBytes:
    """Bytes of one slot on each worker, for a model of these widths that `workers` workers divide."""

    def capacity_bytes(group: EditGroup, capacity: Capacity) -> int:
        layout = Layout()
        reads, writes = (Rank(0, workers).shard(widths, site.point) for site in (group.reads, group.site))
        shape = Shape(capacity, reads, writes, dtype)
        return SLOT_TENSORS[group.kind](shape, layout).counters + layout.width

    return capacity_bytes
