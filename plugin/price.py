"""The device memory that room takes, counted on the slot tensors themselves before there are any. Pure."""

from __future__ import annotations

import torch

from edit_store.sites import Widths
from plugin.edited_site import SLOT_TENSORS, Shape
from plugin.reservation import Place, Price, Room
from plugin.slot_rows import Layout


def price(widths: Widths, dtype: torch.dtype) -> Price:
    """Bytes of one slot for room in a model of these widths."""

    def of_room(place: Place, room: Room) -> int:
        layout = Layout()
        shape = Shape(room, widths.of(place.reads.point), widths.of(place.site.point), dtype)
        return SLOT_TENSORS[place.kind](shape, layout).counters + layout.width

    return of_room
