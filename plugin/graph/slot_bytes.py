"""The device memory that room takes, counted on the slot tensors themselves before there are any. Pure."""

from __future__ import annotations

import torch

from vllm_edits.edit_store.sites import Widths
from vllm_edits.plugin.graph.edited_site import SLOT_TENSORS, Shape
from vllm_edits.plugin.graph.reservation import Place, Price, Room
from vllm_edits.plugin.graph.slot_rows import Layout
from vllm_edits.plugin.graph.tensor_parallel import Worker


def price(widths: Widths, dtype: torch.dtype, workers: int = 1) -> Price:
    """Bytes of one slot on each worker, for room in a model of these widths that so many workers divide."""

    def of_room(place: Place, room: Room) -> int:
        layout = Layout()
        reads, writes = (Worker(0, workers).share(widths, site.point) for site in (place.reads, place.site))
        shape = Shape(room, reads, writes, dtype)
        return SLOT_TENSORS[place.kind](shape, layout).counters + layout.width

    return of_room
