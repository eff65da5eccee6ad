"""Writes what requests of experiments came to: one JSON line each, in files that are begun anew when they are full."""

from __future__ import annotations

import logging
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from vllm_edits.plugin.experiments.records import Record

logger = logging.getLogger("vllm.edits")


class ExposureLog:
    """Appends to `exposures-<host>-<process>-<when>-<number>.jsonl` in a folder; without one, to nothing.

    A line is written in one call, so it is there whole or, after a crash of the machine, not. A disk that is full loses
    lines, never requests: `lost` counts them.
    """

    def __init__(self, folder: Path | None, limit_bytes: int) -> None:
        self.lost = 0
        self._folder = folder
        self._limit = limit_bytes
        self._file: int | None = None
        self._size = 0
        self._number = 0
        self._failed = ""
        self._stem = f"exposures-{socket.gethostname()}-{os.getpid()}-{datetime.now(UTC):%Y%m%dT%H%M%S}"

    @property
    def keeps(self) -> bool:
        """Whether anything is written."""
        return self._folder is not None

    def write(self, record: Record) -> None:
        """Append a record."""
        if self._folder is None:
            return
        line = msgspec.json.encode(record) + b"\n"
        try:
            if self._file is None or self._size + len(line) > self._limit:
                self._file = self._begin(self._folder)
            written = os.write(self._file, line)
        except OSError as error:
            self._lose(str(error))
            return
        self._size += written
        if written < len(line):  # half a line is borne at the end of a file, not within
            self.close()
            self._lose("the disk is full")

    def _lose(self, why: str) -> None:
        self.lost += 1
        if why != self._failed:  # once, not for every request
            self._failed = why
            logger.error(
                "exposures are lost, because %s cannot be written: %s. Free space there, or set another "
                "edits.exposure_folder",
                self._folder, why,
            )  # fmt: skip

    def _begin(self, folder: Path) -> int:
        self.close()
        folder.mkdir(parents=True, exist_ok=True)
        self._number += 1
        path = folder / f"{self._stem}-{self._number}.jsonl"
        self._size = 0
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
