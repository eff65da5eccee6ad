"""Docstrings and user-visible texts are plain: no puzzles, no archaic words; help has examples that are right."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tests.support.documents.commands import Wrong, our_command
from vllm_edits.plugin.cli.commands import app
from vllm_edits.plugin.metrics import METRICS
from vllm_edits.server_config.settings import EditSettings, Reserve, ReserveWeight

ROOT = Path(__file__).parents[2]
FOLDERS = ("edit_store", "plugin", "server_config")
PUZZLE = re.compile(r"(what|which|whether|who|whom|whose|how|where|that)\b", re.IGNORECASE)
"""First words that never say what the thing is."""
ARCHAIC = re.compile(r"\b(whoever|whomever|nobody|somebody|anew|besides|for ever)\b", re.IGNORECASE)
_HELP_LINE = re.compile(r"^[a-z-]+:.*## (.*)$", re.MULTILINE)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those of attributes included."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                text = statement.value.value
                if isinstance(text, str):
                    yield statement.lineno, text


def puzzles(source: str) -> list[int]:
    """Lines of docstrings that begin with a question word."""
    return [line for line, text in docstrings(source) if PUZZLE.match(text.strip())]


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every string that people may read: of three words or more, and no docstring."""
    tree = ast.parse(source)
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and id(node) not in bare else None
        if isinstance(text, str) and len(text.split()) >= 3:
            yield node.lineno, text  # type: ignore[attr-defined]


def archaic(source: str) -> list[int]:
    """Lines of messages with an archaic word."""
    return [line for line, text in messages(source) if ARCHAIC.search(text)]


def sources() -> list[str]:
    """Paths of all modules."""
    paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def commands(group: Any, names: tuple[str, ...] = ("vllm-edits",)) -> Iterator[tuple[str, Any]]:
    """Every command and every group of commands, by its full name."""
    yield " ".join(names), group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*names, name))


def texts() -> Iterator[tuple[str, str]]:
    """Help of settings, metrics, commands, options and make targets, each by its name."""
    for model in (EditSettings, Reserve, ReserveWeight):
        for name, field in model.model_fields.items():
            yield f"{model.__name__}.{name}", field.description or ""
    for metric in METRICS:
        yield metric.name, metric.help
    for name, command in commands(get_command(app)):
        yield name, command.help or ""
        for parameter in command.params:
            if parameter.name not in ("install_completion", "show_completion", "context"):
                yield f"{name} {parameter.name}", getattr(parameter, "help", None) or ""
    for line in _HELP_LINE.findall((ROOT / "Makefile").read_text()):
        yield "make", line


def examples(text: str) -> list[str]:
    """Commands in a help text: lines that begin with ours."""
    return [line.strip() for line in text.splitlines() if line.strip().startswith("vllm-edits ")]


def test_no_docstring_begins_with_a_question_word() -> None:
    found = {path: lines for path in sources() if (lines := puzzles((ROOT / path).read_text()))}
    assert found == {}


def test_no_message_has_an_archaic_word() -> None:
    found = {path: lines for path in sources() if (lines := archaic((ROOT / path).read_text()))}
    assert found == {}


def test_no_help_text_is_missing_or_has_an_archaic_word() -> None:
    told = dict(texts())
    assert [name for name, text in told.items() if not text.strip()] == []
    assert {name: text for name, text in told.items() if ARCHAIC.search(text)} == {}
    assert len(told) > 150, "positive control: they are found"


@pytest.mark.parametrize("name", [name for name, each in commands(get_command(app)) if not hasattr(each, "commands")])
def test_the_help_of_a_command_begins_with_a_verb_and_has_right_examples(name: str) -> None:
    text = dict(commands(get_command(app)))[name].help
    first = text.split("\n\n")[0]
    assert re.match(r"[A-Z][a-z-]+ ", first), first
    assert not PUZZLE.match(first), first
    assert any(line.startswith(f"{name} ") for line in examples(text)), f"no example of {name}"
    for line in examples(text):
        our_command(shlex.split(line))


def test_what_is_wrong_is_seen() -> None:
    """Negative control of each check."""
    module = '"""%s"""\nclass A:\n    """%s"""\n    b: int\n    """%s"""\n\n    def c(self):\n        """%s"""\n'
    assert puzzles(module % ("Reads a file.", "A file.", "number of lines", "True if it is open, whether or not")) == []
    wrong = module % ("What a file says.", "Which file it is.", "how many lines", "Whether it is open.")
    assert puzzles(wrong) == [1, 3, 5, 8]
    assert puzzles('"""Whole files."""') == puzzles('"""Thatched roofs."""') == [], "only whole words"
    assert archaic('raise ValueError("it was changed by Somebody else")') == [1]
    assert archaic('raise ValueError(f"{x} is begun anew for {y} now")') == [1]
    assert archaic('"""Nobody reads this."""\nraise ValueError("another process changed it")') == []
    for word in ("Whoever", "nobody", "somebody", "anew", "besides", "for ever"):
        assert ARCHAIC.search(f"it waits {word}")
    assert not ARCHAIC.search("a renewed lease, forever beside the newest")
    assert _HELP_LINE.findall("lock: $(A) ## resolve anew\n\tpip\n") == ["resolve anew"]
    with pytest.raises(Wrong):
        our_command(shlex.split(examples("Example:\n  vllm-edits promote polite --storr ./store")[0]))
