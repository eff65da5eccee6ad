"""What a step on a GPU, or in the rehearsal of one, tells: a fact a line, as JSON, as soon as it is known."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
RESULTS = "GPU_RESULTS"
"""names the file that facts are added to"""


class Wrong(Exception):
    """Something is not as it should be."""


def tell(what: str, **facts: Any) -> None:
    """Print a fact, and add it to the results."""
    line = json.dumps({"what": what, "second": round(time.monotonic() - BEGAN, 1), **facts}, default=str)
    print(line, flush=True)
    if path := os.environ.get(RESULTS):
        with Path(path).open("a") as results:
            results.write(line + "\n")


def require(holds: object, what: str) -> None:
    """Wrong, unless it holds."""
    if not holds:
        raise Wrong(what)


def tried(what: str, act: Callable[[], dict[str, Any]], **facts: Any) -> bool:
    """Tell what `act` finds, or why it failed."""
    try:
        tell(what, **facts, **act())
    except Exception as error:  # noqa: BLE001  the next steps go on
        traceback.print_exc()
        tell(what, **facts, error=f"{type(error).__name__}: {error}"[:1500])
        return False
    return True


def ended(worked: bool) -> None:
    """End at once: nothing more is wanted, and what torch does at an exit can take minutes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(not worked)
