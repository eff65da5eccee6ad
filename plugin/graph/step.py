"""Inputs of a step, read inside the compiled graph. `step_filler.py` writes them before each forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Step(nn.Module):
    """Inputs of every site in a step: each token's slot, [T], and its scale for each scope row, [T, scope rows]."""

    slots: Tensor
    token_scales: Tensor

    def __init__(self, max_tokens: int, scope_rows: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("slots", torch.zeros(max_tokens, dtype=torch.int32, device=device), persistent=False)
        scales = torch.ones(max_tokens, scope_rows, dtype=torch.float32, device=device)
        self.register_buffer("token_scales", scales, persistent=False)

    def token_scale(self, scope_row: Tensor, slots: Tensor) -> Tensor:
        """[T, 1]: each token's scale for the scope of its slot's edit; scope_row: [S]."""
        # One flat index: a gather would compare lengths, and so fix the graph to one number of tokens.
        tokens = torch.arange(slots.shape[0], device=slots.device)
        scales, width = self.token_scales.flatten(), self.token_scales.shape[1]
        return scales[tokens * width + scope_row[slots].long()].unsqueeze(-1)
