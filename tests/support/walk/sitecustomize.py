"""Notes which modules of the plugin a process runs, between two signals. Python imports this by its name at its start.

SIGRTMIN+1 begins; SIGRTMIN+2 ends, and writes `<process>.json` into the folder that WALK_FOLDER names: the modules in
the order of their first call. A function counts, a module that is only imported does not.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

_FOLDER = Path(os.environ["WALK_FOLDER"])
_INSIDE = f"{os.sep}plugin{os.sep}"
_seen: dict[str, None] = {}
_noting = False


def _note(frame: FrameType, event: str, _argument: Any) -> None:
    if _noting and event == "call":
        package, inside, module = frame.f_code.co_filename.rpartition(_INSIDE)
        if inside and package.endswith("vllm_edits") and frame.f_code.co_name != "<module>":
            _seen.setdefault(module)


def _begin(_number: int, _frame: Any) -> None:
    global _noting  # noqa: PLW0603  a signal handler has no object of its own
    _seen.clear()
    _noting = True
    sys.setprofile(_note)


def _end(_number: int, _frame: Any) -> None:
    global _noting  # noqa: PLW0603
    _noting = False
    sys.setprofile(None)
    written = _FOLDER / f"{os.getpid()}.part"
    written.write_text(json.dumps(list(_seen)))
    written.replace(_FOLDER / f"{os.getpid()}.json")


threading.setprofile(_note)  # of threads that begin later: what is read and checked is read in them
signal.signal(signal.SIGRTMIN + 1, _begin)
signal.signal(signal.SIGRTMIN + 2, _end)
