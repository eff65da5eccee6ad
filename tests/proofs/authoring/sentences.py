"""Thousands of English sentences that are on every machine: those of docstrings in installed packages."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

NAME = "sentences"
"""of the file"""
PACKAGES = ("numpy", "torch", "transformers")
COUNT = 5000
_WHOLE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()-]{40,200}\.")


def written(folder: Path) -> Path:
    """A file of sentences as a table `text`."""
    path = folder / f"{NAME}.jsonl"
    if not path.is_file():
        path.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences()))
    return path


def sentences() -> list[str]:
    """COUNT sentences, each once, in the order of packages and files."""
    found: dict[str, None] = {}
    for package in PACKAGES:
        for docstring in _docstrings(package):
            for sentence in re.split(r"(?<=\.)\s+", " ".join(docstring.split())):
                if _WHOLE.fullmatch(sentence):
                    found[sentence] = None
        if len(found) >= COUNT:
            break
    return list(found)[:COUNT]


def _docstrings(package: str) -> Iterator[str]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    for root in spec.submodule_search_locations or ():
        for path in sorted(Path(root).rglob("*.py")):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    yield ast.get_docstring(node) or ""
