"""Writes the exposure log: one JSON line for each request of an experiment. A full file is followed by a new file."""

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
    """Appends to `exposures-<host>-<process>-<when>-<number>.jsonl` in a folder. Without a folder, it does nothing.

    Each line is written in one call. So after a crash of the machine, a line is complete or missing. If the disk is
    full, lines are lost, but requests are answered: `lost` counts the lost lines.
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
        """True if exposures are written."""
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
        if written < len(line):  # readers accept an incomplete line only at the end of a file
            self.close()
            self._lose("the disk is full")

    def _lose(self, why: str) -> None:
        self.lost += 1
        if why != self._failed:  # once, not at every request
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
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
