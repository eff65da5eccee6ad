"""One of many processes that append to the same log. Line by line on standard input: the number of a round's head.

Answers `won`, `lost` or what went wrong. Started by tests/store/test_races.py.
"""

from __future__ import annotations

import os
import sys

from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.errors import Conflict, EditsError


def main(url: str, version: str) -> None:
    """Race until standard input ends."""
    log = EditStore(url).tag_log("polite", "race")
    mine = {"name": "polite", "tag": "race", "version": version, "operation": "promote", "actor": str(os.getpid())}
    _answer("ready")
    for line in sys.stdin:
        try:
            log.append(log.get(int(line)), reason="", **mine)
        except Conflict:
            _answer("lost")
        except EditsError as error:
            _answer(f"? {error}".replace("\n", " "))
        else:
            _answer("won")


def _answer(word: str) -> None:
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
