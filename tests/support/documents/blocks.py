"""Runs the blocks of a page, and says of each that neither runs nor says why not where it is and what to do."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.support.documents import ours, ready
from tests.support.documents.commands import Wrong
from tests.support.documents.markdown import Block, Note, Page
from tests.support.documents.sandbox import TOOLS, Noted, Sandbox, World

SHELL = {"console", "bash", "sh", "shell"}
DOCUMENTS = {"yaml", "json", "jsonl"}
OUTPUT = {"text", "promql", "mermaid"}
"""Languages of blocks: commands, documents, and what is only looked at. Any other one must say why it is not run."""
_ALWAYS_THERE = {"numpy", "vllm_edits.edit_store", "vllm_edits.server_config"}
"""Packages that need neither an engine nor a server, beside Python's own."""


def files_shown(pages: Iterable[Page]) -> dict[str, str]:
    """Texts of blocks that are files, by name: a page that speaks of such a file need not show it again."""
    return {note.text: block.text for page in pages for block in page.blocks for note in block.said("file")}


def faults(page: Page, world: World, folder: Path, files: Mapping[str, str], patch: pytest.MonkeyPatch) -> list[str]:
    """Everything that is wrong with the blocks of a page, run in their order in a folder of their own."""
    text = "\n".join(block.text for block in page.blocks)
    with world.buckets(text, patch) as environment:
        return [f"{page.path}:{line}: {what}" for line, what in _Run(page, world, folder, files, environment).faults()]


class _Run:
    """One run of a page: the sandbox and the names of Python that its blocks share."""

    def __init__(
        self, page: Page, world: World, folder: Path, files: Mapping[str, str], environment: Mapping[str, str]
    ) -> None:
        self._page = page
        self._world = world
        self._folders = (folder / f"sandbox-{number}" for number in count())
        self._files, self._environment = files, environment
        self._sandbox: Sandbox | None = None
        self._names: dict[str, Any] = {}

    @property
    def sandbox(self) -> Sandbox:
        """Made when a block wants it."""
        if self._sandbox is None:
            self._sandbox = self._world.sandbox(next(self._folders), self._files, self._environment)
        return self._sandbox

    def faults(self) -> Iterator[tuple[int, str]]:
        for note in self._page.astray:
            yield note.line, f"the comment {note.kind!r} stands above no block: put it directly above one, or remove it"
        for block in self._page.blocks:
            if block.said("begins anew"):
                self._sandbox, self._names = None, {}
            yield from self._faults_of(block)

    def _faults_of(self, block: Block) -> Iterator[tuple[int, str]]:
        for note in block.said("not run"):
            if not note.text:
                yield note.line, "no reason is given: write <!-- not run: why -->"
        whole = [note for note in block.said("not run") if not note.commands]
        if block.language in SHELL:
            yield from self._read(block, whole) if whole else self._run(block)
        elif block.language == "python":
            yield from self._python_read(block, whole) if whole else self._python(block)
        elif block.language in DOCUMENTS:
            yield from self._document(block, whole)
        elif block.language in OUTPUT:
            if whole:
                yield whole[0].line, f"a block of {block.language} is never run: remove the comment"
        elif not whole:
            known = ", ".join(sorted(SHELL | DOCUMENTS | OUTPUT | {"python"}))
            yield (
                block.line,
                (
                    f"nobody knows how to run {block.language or 'a block without a language'!r}: name one of {known} "
                    "behind its fence, or say above it why it is not run: <!-- not run: why -->"
                ),
            )

    # -- commands ------------------------------------------------------------------------------------------------------

    def _run(self, block: Block) -> Iterator[tuple[int, str]]:
        text = _commands(block.text)
        ran = self.sandbox.run(text)
        absent = [each for each in ran.noted if each.code is None and each.words[0] not in self._world.reader.known]
        for each in absent:
            yield block.line + each.line - 1, f"blocks are run without `{each.words[0]}`. {_MEND}"
        failed = {} if absent else {each.line: (each.code, " ".join(each.words)) for each in ran.noted if each.code}
        if ran.code and not absent:
            line = text.splitlines()[ran.line - 1].strip() if 0 < ran.line <= len(text.splitlines()) else "the block"
            failed[max(ran.line, 1)] = (ran.code, line)
        for number, (code, command) in sorted(failed.items()):
            yield block.line + number - 1, f"ends with {code}: {command}\n{ran.said.strip()}\n{_MEND}"
        yield from self._said_why(block, [each for each in ran.noted if each not in absent])
        yield from self._wrong(block, ran.noted)

    def _said_why(self, block: Block, noted: Sequence[Noted]) -> Iterator[tuple[int, str]]:
        """Commands that are only read need a comment that says so, and no others may have one."""
        notes = [(note, tuple(words.split())) for note in block.said("not run") for words in note.commands]
        unused = dict.fromkeys((note, words) for note, words in notes)
        for each in noted:
            meant = [pair for pair in notes if tuple(each.words[: len(pair[1])]) == pair[1]]
            if each.code is None and not meant and not _handed_on(each, noted):
                yield (
                    block.line + each.line - 1,
                    (
                        f"`{_called(each.words)}` is only read here, and not run: say why above the block, as "
                        f"<!-- not run ({_called(each.words)}): why -->"
                    ),
                )
            for pair in meant if each.code != 0 else ():
                unused.pop(pair, None)
        for note, words in unused:
            yield note.line, f"no `{' '.join(words)}` below is left out: the comment is not so, remove it"

    def _read(self, block: Block, whole: Sequence[Note]) -> Iterator[tuple[int, str]]:
        ran = self.sandbox.run(_commands(block.text), only_read=True)
        if "syntax error" in ran.said:
            yield block.line, f"the shell cannot read it: {ran.said.strip()}"
        if ran.noted and all(map(self._can_run, ran.noted)):
            yield whole[0].line, f"all commands below can be run: remove the comment {whole[0].text!r}"
        yield from self._wrong(block, ran.noted)

    def _wrong(self, block: Block, noted: Sequence[Noted]) -> Iterator[tuple[int, str]]:
        for each in noted:
            if each.code is None:
                try:
                    self._world.reader.read(each.words, self.sandbox.folder)
                except Wrong as error:
                    yield block.line + each.line - 1, f"{' '.join(each.words)}: {error}"

    @staticmethod
    def _can_run(noted: Noted) -> bool:
        """Whether a command needs nothing but a store."""
        words = noted.words
        if words[0] in TOOLS:
            return True
        elsewhere = any("://" in word and not word.startswith(("s3://", "file://", "memory://")) for word in words)
        if words[0] != "vllm-edits" or elsewhere:
            return False
        return all(tuple(words[1 : 1 + len(each)]) != each for each in ready.ELSEWHERE + ready.STARTS_VLLM)

    # -- Python --------------------------------------------------------------------------------------------------------

    def _python(self, block: Block) -> Iterator[tuple[int, str]]:
        source = "\n" * (block.line - 1) + self._world.spoken(block.text)
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            yield error.lineno or block.line, f"no Python: {error.msg}"
            return
        if any(name.partition(".")[0] == "vllm" for name in _imported(tree)):
            yield block.line, f"it imports vLLM, and no engine is started for a page. {_MEND}"
            return
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.chdir(self.sandbox.folder)
            for name, value in self.sandbox.environment.items():
                patch.setenv(name, value)
            try:
                exec(compile(tree, self._page.path, "exec", dont_inherit=True), self._names)  # noqa: S102  the page's own
            except Exception as error:  # noqa: BLE001  whatever it is, the page is wrong
                frames = [
                    each for each in traceback.extract_tb(error.__traceback__) if each.filename == self._page.path
                ]
                yield frames[-1].lineno or block.line, f"ends with {type(error).__name__}: {error}\n{_MEND}"

    def _python_read(self, block: Block, whole: Sequence[Note]) -> Iterator[tuple[int, str]]:
        try:
            tree = ast.parse(block.text)
        except SyntaxError as error:
            yield block.line + (error.lineno or 1) - 1, f"no Python: {error.msg}"
            return
        modules = _imported(tree)
        always = _ALWAYS_THERE | sys.stdlib_module_names
        if modules and all(any(f"{name}.".startswith(f"{each}.") for each in always) for name in modules):
            yield whole[0].line, f"what it imports is always there, so it can be run: remove {whole[0].text!r}"
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm_edits"):
                module = import_module(node.module or "")
                for each in node.names:
                    if each.name not in getattr(module, "__all__", ()) and not hasattr(module, each.name):
                        yield block.line + node.lineno - 1, f"{node.module} has no {each.name}"

    # -- documents -----------------------------------------------------------------------------------------------------

    def _document(self, block: Block, whole: Sequence[Note]) -> Iterator[tuple[int, str]]:
        lines = block.text.splitlines() if block.language == "jsonl" else [block.text]
        for number, text in enumerate(lines):
            try:
                kind = ours.check(self._world.spoken(text), self._world.reader)
            except Wrong as error:
                yield block.line + number, str(error)
                continue
            if kind and whole:
                yield whole[0].line, f"it is {kind}, and was checked: remove the comment {whole[0].text!r}"
            if not kind and not whole:
                yield (
                    block.line + number,
                    (
                        f"it is none of {', '.join(ours.KINDS)}: say above it why it is not checked, as "
                        "<!-- not run: why -->"
                    ),
                )


_MEND = "Mend the document, or say above the block why it is not run: <!-- not run: why -->"


def _handed_on(each: Noted, noted: Sequence[Noted]) -> bool:
    """Whether vLLM's words are those that a command of ours handed on: then the comment speaks of that one."""
    theirs = [one.words[:2] for one in noted if one.line == each.line]
    return each.words[0] == "vllm" and any(
        words == ["vllm-edits", name] for (name,) in ready.STARTS_VLLM for words in theirs
    )


def _imported(tree: ast.AST) -> set[str]:
    """The modules that a block imports."""
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def _called(words: Sequence[str]) -> str:
    """A command's name: of those with subcommands, with these."""
    if words[0] not in ("vllm-edits", "vllm"):
        return words[0]
    names = [word for word in words[:3] if re.fullmatch(r"[a-z][a-z-]*", word)]
    groups = {each[0] for each in ready.ELSEWHERE if len(each) > 1}
    return " ".join(names[: 3 if len(names) > 1 and names[1] in groups else 2])


def _commands(text: str) -> str:
    """What is typed: all lines, or where some begin with a prompt those, and what goes on from them."""
    lines = text.splitlines()
    if not any(line.startswith("$ ") for line in lines):
        return text
    typed, going_on = [], False
    for line in lines:
        is_typed = going_on or line.startswith("$ ")
        typed.append(line.removeprefix("$ ") if is_typed else "")
        going_on = is_typed and line.endswith("\\")
    return "\n".join(typed)
