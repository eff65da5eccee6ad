"""Greedy continuations without a cache: edits with a scope need whole sequences, and the length of the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vllm_edits.edit_store.authoring.formula import FormulaRequest
from vllm_edits.edit_store.authoring.host import Edits, Host, edited


@torch.inference_mode()
def continued(
    host: Host, edits: Edits, prompt: Sequence[int], tokens: int, *, strength: float = 1.0
) -> Iterator[tuple[int, Tensor]]:
    """Each token that the edited model goes on with, and the log-probabilities [vocabulary] it was chosen by."""
    ids = list(prompt)
    for _ in range(tokens):
        with edited(host.model, edits, strength=strength, request=FormulaRequest(ids, len(prompt))):
            logits = host.model(torch.tensor([ids], device=host.device), use_cache=False, logits_to_keep=1).logits
        row = logits[0, -1].float().log_softmax(-1)
        ids.append(int(row.argmax()))
        yield ids[-1], row
