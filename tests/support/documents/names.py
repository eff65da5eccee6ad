"""What pages name: links and their anchors, paths, commands, modules, settings, series, headers, routes."""

from __future__ import annotations

import importlib
import posixpath
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from fnmatch import fnmatchcase
from urllib.parse import unquote

from tests.support.documents.commands import (
    PLACEHOLDER,
    Reader,
    Wrong,
    require_route,
    source_of,
)
from tests.support.documents.markdown import Page, Piece
from tests.support.documents.repository import ROOT
from vllm_edits.edit_store.errors import nearest
from vllm_edits.plugin.headers import OF_ANSWERS, OF_REQUESTS
from vllm_edits.plugin.metrics import METRICS, PREFIX
from vllm_edits.server_config.settings import KEY, EditSettings

Fault = tuple[int, str]
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//")
_PATH = re.compile(r"\.{0,2}[\w./*-]*[\w/*]")
_FILE = re.compile(r".*\.(?:py|md|yaml|yml|json|jsonl|svg|toml|cpp|hpp|txt|sh)")
_MADE = (".cache/", ".venv/", "kit/", "manifests/", "tags/")
"""Folders that are in no repository: made by commands, or in a store."""
_MEMBER = re.compile(r"vllm_edits(?:\.\w+)+")
_LISTS = {"counter": ("_total",), "gauge": ("",), "histogram": ("", "_bucket", "_sum", "_count"),
          "summary": ("", "_sum", "_count")}  # fmt: skip


# -- links -------------------------------------------------------------------------------------------------------------


def faults_of_links(page: Page, pages: Mapping[str, Page], tracked: AbstractSet[str]) -> Iterator[Fault]:
    """Links within the repository to a file that git has not, or to a heading that is not there."""
    for link in page.links:
        if _ELSEWHERE.match(link.text):
            continue
        path, _, anchor = unquote(link.text).partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.path), path)) if path else page.path
        if target not in tracked and target not in _folders(tracked) and target != ".":
            yield link.line, f"the link {link.text!r} leads nowhere: there is no {target}{_moved(target, tracked)}"
        elif anchor and target in pages and anchor not in pages[target].anchors:
            yield link.line, f"{target} has no heading #{anchor}.{nearest(anchor, pages[target].anchors)}"


def _folders(tracked: AbstractSet[str]) -> set[str]:
    return {path[:place] for path in tracked for place, letter in enumerate(path) if letter == "/"}


def _moved(path: str, tracked: AbstractSet[str]) -> str:
    """Where a file of that name is now."""
    parts = path.rstrip("/").split("/")
    found = [each for each in sorted(tracked | _folders(tracked)) if each.rpartition("/")[2] == parts[-1]]
    alike = {each: len(posixpath.commonprefix([each.split("/")[::-1], parts[::-1]])) for each in found}
    best = [each for each in found if alike[each] == max(alike.values())]
    return f", but {' and '.join(best[:3])}" if best else ""


# -- names in code -----------------------------------------------------------------------------------------------------


def faults_of_names(page: Page, reader: Reader, tracked: AbstractSet[str]) -> Iterator[Fault]:
    """Code within the text, and what has a form of its own anywhere, that names what is not there."""
    for code in page.code:
        why = _path(code.text, page.path, tracked) or _by_form(code.text) or _command(code, reader)
        if why:
            yield code.line, f"`{code.text}`: {why}"
    for number, line in enumerate(page.text.splitlines(), 1):
        for pattern, ask in _ANYWHERE.items():
            for found in re.finditer(pattern, line):
                if why := ask(found[1]):
                    yield number, why


def _path(text: str, page: str, tracked: AbstractSet[str]) -> str | None:
    """Why a text that looks like a path of the repository is none."""
    is_file = _FILE.fullmatch(text)
    if not _PATH.fullmatch(text) or text.startswith(("/", *_MADE)) or "//" in text or not (is_file or "/" in text):
        return None
    if is_file and "/" not in text and not text.endswith((".py", ".md")):
        return None  # a file of the reader's, such as trust.json
    known = tracked | _folders(tracked)
    top = text.removeprefix("./").partition("/")[0]
    if PLACEHOLDER.fullmatch(top):
        return None
    if not is_file and not text.endswith("/") and top not in known:
        return None
    wanted = text.removeprefix("vllm_edits/").rstrip("/") or text
    here = {posixpath.normpath(posixpath.join(folder, wanted)) for folder in ("", posixpath.dirname(page))}
    if here & known or text == "vllm_edits/":
        return None
    if "*" in text and any(fnmatchcase(each, one) for one in here for each in known):
        return None
    if is_file and any(each.endswith(f"/{wanted}") for each in tracked):
        return None
    return f"there is no such file or folder{_moved(text, tracked)}"


def _command(code: Piece, reader: Reader) -> str | None:
    """Why a text that is one or more commands is none."""
    for part in re.split(r"&&|\|\||;|\|", code.text):
        first = part.split()[:1]
        if first and first[0].rpartition("/")[2] in reader.known:
            try:
                words = shlex.split(part)
                reader.read([words[0].rpartition("/")[2], *words[1:]])
            except (Wrong, ValueError) as error:
                return str(error)
    return None


def _by_form(text: str) -> str | None:
    for pattern, ask in _WHOLE.items():
        if found := re.fullmatch(pattern, text):
            return ask(*found.groups())
    return None


def _setting(name: str) -> str | None:
    known = EditSettings.model_fields
    return None if name in known else f"there is no setting {KEY}.{name}.{nearest(name, known)}"


def _route(method: str, path: str) -> str | None:
    try:
        require_route(method, path)
    except Wrong as error:
        return str(error)
    return None


def _member(text: str) -> str | None:
    names = text.split(".")
    for length in range(len(names), 0, -1):
        try:
            found = importlib.import_module(".".join(names[:length]))
        except ModuleNotFoundError:
            continue
        for name in names[length:]:
            if name in getattr(found, "__all__", ()):  # what imports vLLM is not asked for
                return None
            if not hasattr(found, name):
                return f"{'.'.join(names[:length])} has no {name}"
            found = getattr(found, name)
        return None
    return None


def _module(name: str) -> str | None:
    return None if source_of(name) else f"there is no module {name} to run"


def _series(name: str) -> str | None:
    known = {f"{PREFIX}{metric.name}{end}" for metric in METRICS for end in _LISTS[metric.kind]}
    return None if name in known else f"there is no series {name}.{nearest(name, known)}"


def _header(name: str) -> str | None:
    known = {*OF_REQUESTS, *OF_ANSWERS}
    return None if name in known else f"there is no header {name}.{nearest(name, known)}"


def _extras(names: str) -> str | None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    unknown = [name for name in names.split(",") if name not in known]
    return f"vllm-edits has no extra {unknown[0]!r}; it has {', '.join(known)}" if unknown else None


_WHOLE: Mapping[str, Callable[..., str | None]] = {
    rf"{KEY}\.(?!py$|safetensors$|tar$)([a-z_]+)(?:=.*)?": _setting,
    r"(GET|POST|PUT|PATCH|DELETE) (/[\w./{}-]*)": _route,
    rf"({_MEMBER.pattern})": _member,
}
"""Forms of a whole piece of code, and why it would name nothing."""
_ANYWHERE: Mapping[str, Callable[[str], str | None]] = {
    r"python3? -m ([\w.]*\w)": _module,
    rf"\b({PREFIX}[a-z_]*[a-z])\b(?!_)": _series,
    r"\b(x-edits-[a-z-]*[a-z])\b": _header,
    r"--set '?(?!name=value)([a-z_]+)=": _setting,
    r"vllm-edits\[([\w,]+)\]": _extras,
}
"""Forms anywhere on a line, code or not."""
