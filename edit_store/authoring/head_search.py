"""Common parts of the searches for attention heads: prompts, masks, edits, and the list of the heads found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from pydantic import Field

from vllm_edits.edit_store.authoring.chat import asked
from vllm_edits.edit_store.authoring.data import PromptRow, Table
from vllm_edits.edit_store.authoring.heads import Head, Mask, listed, masked
from vllm_edits.edit_store.authoring.host import Edits
from vllm_edits.edit_store.authoring.method import Inputs, Layers, Method, Work, layer_problems
from vllm_edits.edit_store.errors import Reason

PROTECT_FILE = "protect.json"


class HeadSearch(Method):
    """Base of the searches for heads."""

    tables: ClassVar[Mapping[str, Table]] = {"prompts": Table(PromptRow, "prompts of one behaviour", least=2)}
    kinds: ClassVar[tuple[str, ...]] = ("scale", "low_rank")

    layers: Layers | None = Field(None, description="Layers whose heads are searched. Default: all.")
    mask: Mask = Field("queries", description="How a head is masked.")
    factor: float = Field(1e-5, description="What queries or output are scaled by.")
    chat: bool = Field(True, description="Put prompts into the model's chat template.")

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        yield from layer_problems(self._layers(inputs), inputs)

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        return inputs.layers_from(self.layers, 0)

    def _prompts(self, inputs: Inputs) -> list[str]:
        return [asked(inputs.tokenizer, row.prompt) if self.chat else row.prompt for row in inputs.data["prompts"]]

    def _masked_tokens(self, inputs: Inputs) -> int:
        """Tokens that pass through the model when every head is masked once."""
        heads = len(self._layers(inputs)) * inputs.base.widths.heads
        return heads * inputs.count(self._prompts(inputs))

    def _edits(self, work: Work, scores: Mapping[Head, float]) -> Edits:
        """The edits that mask these heads; the same heads as a list of what others must not touch."""
        work.notes[PROTECT_FILE] = listed(scores, work.inputs.base, self.called())
        return masked(scores, self.mask, self.factor, work.inputs.base)
