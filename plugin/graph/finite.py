"""Numbers that are none, kept out of what requests share."""

from __future__ import annotations

import torch
from torch import Tensor


def finite(x: Tensor) -> Tensor:
    """x, and where that is infinite or NaN the largest number of its type. Finite numbers stay bit for bit."""
    largest = torch.finfo(x.dtype).max
    return torch.where(x.abs() <= largest, x, largest)  # nan_to_num is compiled to a loop over single numbers
