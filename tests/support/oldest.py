"""The oldest vLLM that is tried."""

from __future__ import annotations

OLDEST = "0.27.0"  # 0.26 has a CPU build too, but for a torch of which no CPU build is to be had
