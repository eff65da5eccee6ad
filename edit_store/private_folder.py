"""Folders of this user: the cache folder, and temporary folders that the processes of one server share."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from vllm_edits.edit_store.errors import UnsupportedHost


def cache_folder() -> Path:
    """`vllm-edits` in the user's cache folder: XDG_CACHE_HOME, or ~/.cache.

    A user without a writable home, as in some containers, gets a folder below the temporary folder.
    """
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "vllm-edits"
    home = os.path.expanduser("~")  # noqa: PTH111  Path.home raises where there is none
    found = Path(home, ".cache", "vllm-edits")
    there = next(each for each in (found, *found.parents) if os.path.exists(each))  # noqa: PTH110  what may not be seen is not there
    return found if found.is_absolute() and os.access(there, os.W_OK | os.X_OK) else private_folder("cache")


def private_path(name: str) -> Path:
    """The path of the folder with this name. It need not exist."""
    return Path(tempfile.gettempdir()) / f"vllm-edits-{os.getuid()}-{name}"


def private_folder(name: str) -> Path:
    """The folder with this name below the temporary folder. It is made if it does not exist.

    UnsupportedHost if it belongs to another user, is open to others, or is not a folder.
    """
    folder = private_path(name)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise UnsupportedHost(
            f"expected {folder} to be a folder that only this user can access. Remove it, or set TMPDIR to a folder of "
            "your own"
        )
    return folder
