"""Callbacks of long work, which show how far it is."""

from __future__ import annotations

from collections.abc import Callable

BytesDone = Callable[[int], None]
"""Called with the number of bytes that were just read."""
CountDone = Callable[[int, int], None]
"""Called with the number of items that are done, and the number of all."""
StepDone = Callable[[str, int, int], None]
"""Called with the name of the step, the number of its items that are done, and the number of all."""
