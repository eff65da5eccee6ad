"""Each kind of edit, applied to a batch of tokens that each belong to their own slot: a module for each. Plain torch,
so it fuses.

Every function returns what an edit adds to the value it was given, in float32: a long dot product in bfloat16 loses too
much. Slot 0 is the base model: its tensors are zeros, so it adds exactly zero, and its tokens come out as they went in,
but for the sign of a zero. Gathering by slot costs the same for any number of slots.

Shapes: T tokens, S slots, K rank, I and O width of what is read and written; `slots` is [T], values are [T, width].
Where a worker has a part of the vector that is read, `total` adds up all workers' parts of the dot products, and
`products` says how tokens are multiplied with the vectors of their slots.
"""

from __future__ import annotations

from vllm_edits.plugin.graph.kinds.gate import GateSlots
from vllm_edits.plugin.graph.kinds.low_rank import LowRankSlots
from vllm_edits.plugin.graph.kinds.offset import OffsetSlots
from vllm_edits.plugin.graph.kinds.scale import ScaleSlots
from vllm_edits.plugin.graph.kinds.subspace_filter import SubspaceFilterSlots
from vllm_edits.plugin.graph.slot_tensors import SlotTensors

SLOT_TENSORS: dict[str, type[SlotTensors]] = {
    "scale": ScaleSlots,
    "low_rank": LowRankSlots,
    "gate": GateSlots,
    "subspace_filter": SubspaceFilterSlots,
    "offset": OffsetSlots,
}
