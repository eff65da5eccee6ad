"""Commands print texts of other authors without control characters: a terminal does nothing that they say."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import vllm_edits.plugin.cli  # noqa: F401  adds the server's commands
from tests.support.bundles import random_bundle
from tests.support.fakes import BASE
from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.cli import app, common
from vllm_edits.edit_store.cli.common import complete_name, visible
from vllm_edits.edit_store.experiments.document import Experiment
from vllm_edits.edit_store.experiments.experiment_log import Experiments

ROOT = Path(__file__).parents[2]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
EVIL = "fix\x1b[2J\x1b]0;title\x07\r\x9b31m\u202egnp.exe\x00\x7f"
SHOWN = r"fix\x1b[2J\x1b]0;title\x07\r\x9b31m\u202egnp.exe\x00\x7f"
PLAIN = "café – 日本語 🙂 שלום [bold] :smile: 5 < 6"

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Types a command at another site, whose store is in the environment, on a very wide terminal."""
    EditStore(str(tmp_path / "site"), create=True)
    monkeypatch.setenv("VLLM_EDITS_STORE", str(tmp_path / "site"))
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, list(words))


@pytest.fixture
def store(tmp_path: Path) -> EditStore:
    """Of somebody else, who writes what one must not print."""
    made = EditStore(str(tmp_path / "store"), create=True)
    bundle = random_bundle("polite", BASE, 1, label=EVIL)
    bundle = replace(bundle, manifest=bundle.manifest.model_copy(update={"description": PLAIN + EVIL}))
    made.promote(f"polite@{made.publish(bundle, actor=EVIL)}", reason=PLAIN + EVIL, actor=EVIL)
    arms = [{"name": name, "serves": serves, "weight": 0.5} for name, serves in (("a", "base"), ("b", "polite"))]
    experiments = Experiments(made)
    experiments.create(Experiment.parse({"name": "tone", "model": EVIL, "arms": arms}), reason=EVIL, actor=EVIL)
    return made


COMMANDS = {
    "history polite --store store": PLAIN + SHOWN,
    "list --store store": SHOWN,
    "show polite --store store": PLAIN + SHOWN,
    "inspect polite --store store": PLAIN + SHOWN,
    "experiment list --store store": SHOWN,
    "experiment show tone --store store": SHOWN,
    "experiment history tone --store store": SHOWN,
}


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("words", COMMANDS)
def test_texts_of_other_authors_are_printed_without_control_characters(run: Run, words: str) -> None:
    ran = run(*words.split())
    assert ran.exit_code == 0
    assert COMMANDS[words] in ran.stdout
    assert not CONTROL.search(ran.output)


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("words", COMMANDS)
def test_without_the_helper_they_would_be(run: Run, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control: the texts do reach the terminal."""
    monkeypatch.setattr(common, "visible", lambda text: text)
    assert "\x1b[2J" in run(*words.split()).stdout


def test_what_was_imported_is_printed_so_too(run: Run, store: EditStore) -> None:
    version = store.resolve("polite")
    assert run("export", "polite", "--store", "store", "-o", "polite.edits.tar").exit_code == 0
    assert run("import", "polite.edits.tar").exit_code == 0
    for words in (("list",), ("show", f"polite@{version}"), ("inspect", f"polite@{version}")):
        ran = run(*words)
        assert SHOWN in ran.stdout
        assert not CONTROL.search(ran.output)


def test_errors_are_printed_without_control_characters(run: Run, store: EditStore) -> None:
    store.pin("polite", reason=EVIL, actor=EVIL)
    ran = run("promote", f"polite@{store.resolve('polite')}", "--store", "store")
    assert ran.exit_code == 1
    assert f"is pinned to {store.resolve('polite')[:12]} by {SHOWN}" in ran.stderr
    assert not CONTROL.search(ran.output)


@pytest.mark.usefixtures("store")
def test_json_keeps_the_text(run: Run) -> None:
    """For scripts; JSON itself escapes control characters."""
    ran = run("history", "polite", "--store", "store", "--json")
    assert json.loads(ran.stdout)[0]["reason"] == PLAIN + EVIL
    assert not CONTROL.search(ran.stdout)


def test_a_name_that_no_command_takes_is_not_completed(store: EditStore, tmp_path: Path) -> None:
    names = tmp_path / "store" / "versions"
    (names / "polite\x1b[2J").mkdir()
    (names / "polite\x1b[2J" / f"{'a' * 64}.json").write_text("{}")
    assert "polite\x1b[2J" in store.names()

    class Typed:
        params = {"store": store.url}  # noqa: RUF012  as click has it

    assert complete_name(Typed, "po") == ["polite"]  # type: ignore[arg-type]


@given(st.text())
def test_nothing_but_control_characters_changes(text: str) -> None:
    shown = visible(text)
    assert not CONTROL.search(shown)
    if not CONTROL.search(text) and not re.search("[\ud800-\udfff]", text):
        assert shown == text
    assert shown.encode().decode() == shown, "no surrogate is left, which no terminal takes"


def test_new_lines_and_tabs_stay() -> None:
    assert visible(f"{PLAIN}\n\tindented") == f"{PLAIN}\n\tindented"
    assert visible("a\rb\x85c\ud83d") == r"a\rb\x85c\ud83d"


def printing(source: str) -> list[int]:
    """Lines that print past the helpers."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and (name := ast.unparse(node.func)).rpartition(".")[2] in ("echo", "secho", "print", "print_json")
        and name != "_output.print"
    ]


def test_commands_print_by_the_helpers_alone() -> None:
    folders = ("edit_store/cli", "plugin/cli", "plugin/experiments/analysis")
    paths = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    found = {path.name: lines for path in paths if (lines := printing(path.read_text()))}
    (lines,) = [found.pop("common.py")]
    assert len(lines) == 1, "the helper for lines"
    assert found == {}
    assert printing("import typer\ntyper.echo(reason)\nConsole().print(reason)\nprint(reason)\nplain(reason)") == [
        2,
        3,
        4,
    ]
