"""The repository that documents speak of: its files as git knows them, and its pages."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.support.documents.markdown import Page

ROOT = Path(__file__).parents[3]


@functools.cache
def tracked() -> frozenset[str]:
    """Paths of all files that git keeps, whoever owns the folder."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return frozenset(listed.stdout.split("\0")) - {""}


@functools.cache
def pages() -> Mapping[str, Page]:
    """Every Markdown file, by its path."""
    return {path: Page.read(path, (ROOT / path).read_text()) for path in sorted(tracked()) if path.endswith(".md")}
