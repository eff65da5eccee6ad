"""The check that vLLM's sources have what seams.py names. They are read as text; nothing of vLLM is imported.

Most definitions are plain to see in the text: `class Request`, below it `    def free(` or `self.requests = `. To parse
all of these files takes seconds, so only those are parsed in which something is not plain to see.
"""

from __future__ import annotations

import ast
import gc
import re
from collections.abc import Callable, Iterable, Iterator

from packaging.version import Version

from vllm_edits.plugin.vllm_host.seams import SEAMS, Seam

Read = Callable[[str], str | None]
"""The text of a file of the package `vllm`, None where there is none."""


def missing(read: Read, version: Version, *, parse_all: bool = False) -> list[str]:
    """The interfaces that the sources of a version lack, each with its purpose.

    parse_all: takes nothing as plain to see
    """
    version = Version(version.base_version)
    texts: dict[str, str | None] = {}
    modules: dict[str, ast.Module] = {}
    found = []
    for seam in SEAMS:
        if not seam.is_in(version):
            continue
        text = texts[seam.file] = texts[seam.file] if seam.file in texts else read(seam.file)
        if text is None:
            found.append(f"{seam.needed_for}: no file vllm/{seam.file}")
        elif parse_all or not _is_plain(text, seam):
            module = modules[seam.file] = modules.get(seam.file) or _parsed(text)
            if why := _fault(module, seam):
                found.append(f"{seam.needed_for}: {why}")
    return list(dict.fromkeys(found))


# -- in the text -------------------------------------------------------------------------------------------------------

_UNINDENTED = {"": re.compile(r"^[A-Za-z_@]", re.MULTILINE), "    ": re.compile(r"^ {4}[A-Za-z_@]", re.MULTILINE)}
_END_OF_HEADER = re.compile(r"\)[^()\n]*:[^\n]*\n")
_WORDS_BEFORE = ("", "def ", "async def ", "class ")


def _is_plain(text: str, seam: Seam) -> bool:
    """True if a definition is plain to see. False says nothing."""
    owner, _, name = seam.name.rpartition(".")
    indent = ""
    if owner:
        start = max(text.find(f"\nclass {owner}{sign}") for sign in "(:")
        if start < 0:
            return False
        text, indent = _up_to_the_next(text, start + len("\nclass "), ""), "    "
    starts = [indent + words for words in _WORDS_BEFORE]
    for found in re.finditer(rf"{name}(?:\(|: | = )", text):  # a pattern that begins with a text is searched fast
        before = text[text.rfind("\n", 0, found.start()) + 1 : found.start()]
        if before in starts:
            return _says(text, found.end(), indent, seam)
        sets = owner and before.startswith(" " * 8) and before.strip() == "self." and found[0][-1] == " "
        if sets and not seam.takes and not seam.holds:
            return True
    return False


def _says(text: str, start: int, indent: str, seam: Seam) -> bool:
    """True if a definition that begins there takes and holds what it should."""
    end = _END_OF_HEADER.search(text, start)
    header = text[start : end.end()] if end and seam.takes else ""
    whole = _up_to_the_next(text, start, indent) if seam.holds else ""
    return all(re.search(rf"\b{each}\b *[:=,)]", header) for each in seam.takes) and all(
        re.search(rf"(?<!\w){re.escape(each)}(?!\w)", whole) for each in seam.holds
    )


def _up_to_the_next(text: str, start: int, indent: str) -> str:
    """A definition: up to the next line that is indented as little."""
    end = _UNINDENTED[indent].search(text, start)
    return text[start : end.start() if end else len(text)]


# -- parsed ------------------------------------------------------------------------------------------------------------


def _parsed(text: str) -> ast.Module:
    # A collection that happens to run meanwhile makes Python 3.11 lose count of its depth, and fail.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if collecting:
            gc.enable()


def _fault(module: ast.Module, seam: Seam) -> str:
    """Why a module does not have what it should, or ''."""
    found: ast.AST | None = module
    for part in seam.name.split("."):
        found = _member(module, found, part) if found is not None else None
    if found is None:
        return f"no {seam.name} in vllm/{seam.file}"
    where = f"{seam.name} in vllm/{seam.file}"
    if absent := set(seam.holds) - _words(found) if seam.holds else ():
        return f"{where} names no {' and no '.join(sorted(absent))}"
    if not seam.takes:
        return ""
    if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{where} is not a function"
    arguments = found.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    refused = [name for name in seam.takes if name not in names]
    return f"{where} does not take {' and '.join(refused)}" if refused else ""


def _member(module: ast.Module, group: ast.AST, name: str) -> ast.AST | None:
    """The member with this name in a module or a class, or in a base class in the same module."""
    for named, node in _members(group):
        if named == name:
            return node
    if isinstance(group, ast.ClassDef):
        for base in group.bases:
            held = _member(module, module, base.id) if isinstance(base, ast.Name) else None
            if isinstance(held, ast.ClassDef) and (inherited := _member(module, held, name)) is not None:
                return inherited
    return None


def _members(group: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The names that a module or a class defines, also below `if` and `try`; of a class also what its methods set."""
    for node in ast.iter_child_nodes(group):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node
                if isinstance(group, ast.ClassDef) and not isinstance(node, ast.ClassDef):
                    yield from _set_on_self(node)
            case ast.Import() | ast.ImportFrom():
                yield from ((each.asname or each.name, node) for each in node.names)
            case ast.Assign() | ast.AnnAssign():
                yield from ((target.id, node) for target in _targets(node) if isinstance(target, ast.Name))
            case ast.If() | ast.Try() | ast.ExceptHandler():
                yield from _members(node)


def _set_on_self(method: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(method):
        for target in _targets(node) if isinstance(node, ast.Assign | ast.AnnAssign) else ():
            match target:
                case ast.Attribute(value=ast.Name(id="self"), attr=name):
                    yield name, node


def _targets(node: ast.Assign | ast.AnnAssign) -> Iterable[ast.AST]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return (each for target in targets for each in (target.elts if isinstance(target, ast.Tuple) else [target]))


def _words(node: ast.AST) -> set[str]:
    """Names and texts in a definition."""
    found = set()
    for each in ast.walk(node):
        match each:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word) | ast.Constant(value=str() as word):
                found.add(word)
    return found
