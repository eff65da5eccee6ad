"""Numbers by which edits are judged: norms and distances of products of thin matrices, and shares."""

from __future__ import annotations

from typing import Any

import numpy as np

VISIBLE = 0.01
"""Share of an edit, or overlap of two directions, below which nothing is reported."""

Product = tuple[Any, Any]
"""write and read, [rank, out] and [rank, in], of a product write^T read."""


def product_norm(product: Product) -> float:
    """||write^T read||_F without forming the product: sqrt(sum of (write write^T) * (read read^T))."""
    write, read = product
    return float(np.sqrt(max(0.0, float(np.sum((write @ write.T) * (read @ read.T))))))


def product_moved(old: Product, new: Product, beside: tuple[float, float] = (0.0, 0.0)) -> float:
    """||new - old|| / ||old|| of two products; `beside` are squares to add to both norms.

    The difference of two products is one product of stacked factors, so nothing wide by wide is formed.
    """
    apart = np.concatenate([new[0], -old[0]]), np.concatenate([new[1], old[1]])
    distance = float(np.sqrt(product_norm(apart) ** 2 + beside[0]))
    size = float(np.sqrt(product_norm(old) ** 2 + beside[1]))
    return distance / size if size else float(distance > 0)


def share(part: Any, whole: Any) -> float:
    """||part|| / ||whole||, and 0 where there is nothing."""
    size = float(np.linalg.norm(whole))
    return float(np.linalg.norm(part)) / size if size else 0.0
