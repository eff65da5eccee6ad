"""What users may name changes only where somebody sees it: the list is kept, and the code is held against it."""

from __future__ import annotations

import ast
import re
from difflib import ndiff
from pathlib import Path

import pytest

import vllm_edits
from tests.house.public_surface import KEPT, surface

ROOT = Path(__file__).parents[2]
HOW = "python -m tests.house.public_surface > tests/house/public_surface.txt"


def changed() -> list[str]:
    """Lines that came and went since the list was kept."""
    return [line for line in ndiff(KEPT.read_text().splitlines(), surface()) if line[0] in "+-"]


def test_what_users_may_name_is_what_is_kept() -> None:
    assert changed() == [], f"if that is meant, tell it in CHANGELOG.md, and write the list anew: {HOW}"


def test_a_changed_name_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_edits, "__all__", ["EditsScheduler", "Versions"])
    assert changed() == ["- python vllm_edits.Variants", "+ python vllm_edits.Versions"]


def test_no_header_is_left_out() -> None:
    """Every text in the sources that is a header of ours, wherever it stands."""
    found = {
        text.decode() if isinstance(text, bytes) else text
        for folder in ("edit_store", "plugin", "server_config")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Constant) and isinstance(text := node.value, str | bytes)
    }
    ours = {text for text in found if re.fullmatch(r"x-edits-[a-z-]+", text)}
    assert len(ours) > 5
    assert ours == {line.rpartition(" ")[2] for line in surface() if line.startswith("header ")}
