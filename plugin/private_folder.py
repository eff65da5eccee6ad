"""Folders below the temporary one in which the processes of one server meet, and no other user may look."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from edit_store.errors import UnsupportedHost


def private_folder(name: str) -> Path:
    """The folder of that name, made if need be. UnsupportedHost when it is another user's, or open to others."""
    folder = Path(tempfile.gettempdir()) / f"vllm-edits-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise UnsupportedHost(f"{folder} is not this user's alone. Remove it, or set TMPDIR to a folder of your own")
    return folder
