"""Commands of documents that no test can run, read: what they name must be there, and their flags must be known."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import typer
import yaml
from fastapi.routing import APIRoute
from pydantic import ValidationError
from typer.main import get_command

from tests.support.documents.ready import of, subcommand
from tests.support.documents.repository import ROOT
from vllm_edits.edit_store.cli import app
from vllm_edits.edit_store.errors import SettingsError, nearest
from vllm_edits.plugin.claim import SCHEDULER
from vllm_edits.plugin.cli import serve_arguments  # importing its package adds the server's commands
from vllm_edits.plugin.headers import OF_REQUESTS
from vllm_edits.plugin.http.routes import router
from vllm_edits.server_config.settings import read_settings

_UsageError: Any = typer.BadParameter.__mro__[1]  # typer brings a click of its own, and gives it no public name
PLACEHOLDER = re.compile(r"[A-Z]{3,}|.*[…<>].*")
"""Of a word that readers replace by one of theirs."""

_OTHERS_HEADERS = {"accept", "authorization", "content-type", "x-request-id", "x-api-key"}
_REQUESTS_OF_VLLM = {
    "/v1/completions": ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest"),
    "/v1/chat/completions": ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest"),
}


class Wrong(Exception):
    """What is not so in a command."""


class Reader:
    """Reads commands. `ready` has vLLM look at words in a folder, and gives its code and what it said."""

    def __init__(self, ready: Callable[[Sequence[str], Path], tuple[int, str]]) -> None:
        self._ready = ready
        self._fields: dict[str, list[str]] = {}
        self._known: dict[str, Callable[[Sequence[str], Path], None]] = {
            "vllm-edits": lambda words, _: our_command(words), "vllm": self._vllm,
            "curl": lambda words, _: curl(words, self._fields_of),
            "make": lambda words, _: make(words), "docker": self._docker,
            **dict.fromkeys(("python", "python3"), lambda words, _: python(words)),
        }  # fmt: skip

    @property
    def known(self) -> list[str]:
        """Commands that can be read."""
        return list(self._known)

    def read(self, words: Sequence[str], folder: Path = ROOT) -> None:
        """Wrong for words that cannot be right in that folder. Nothing is known of other programs."""
        if words and words[0] in self._known:
            self._known[words[0]](words, folder)

    def _vllm(self, words: Sequence[str], folder: Path) -> None:
        if list(words[1:2]) != ["serve"]:
            return
        code, said = self._ready(words, folder)
        if code:
            raise Wrong(f"vLLM's parser refuses it: {said.strip()[-500:]}")
        with contextlib.chdir(folder):
            flags = serve_arguments.Flags(words[2:])
        config = flags.get("--additional-config")
        config = json.loads(config) if isinstance(config, str) else config
        if flags.get("--load-format") == serve_arguments.PLUGIN:
            settings(config)
            scheduler = flags.get("--scheduler-cls")
            if scheduler not in (None, SCHEDULER):
                raise Wrong(f"--scheduler-cls: expected {SCHEDULER}, found {scheduler}")

    def _fields_of(self, path: str) -> list[str]:
        """The fields of a request that vLLM answers; none where they are not known."""
        if path not in self._fields:
            code, said = (
                self._ready(["fields", *_REQUESTS_OF_VLLM[path]], ROOT) if path in _REQUESTS_OF_VLLM else (0, "[]")
            )
            assert code == 0, said
            self._fields[path] = json.loads(said.splitlines()[-1])
        return self._fields[path]

    def _docker(self, words: Sequence[str], folder: Path) -> None:
        """Files that it names are there; what runs in the plugin's image is read as if it ran here."""
        for flag, value in pairwise(words):
            if flag in ("-f", "--file") and not (ROOT / value).is_file():
                raise Wrong(f"there is no {value}")
        if "exec" in words and "-f" in words:
            services = yaml.safe_load((ROOT / words[words.index("-f") + 1]).read_text())["services"]
            service, *inner = [word for word in words[words.index("exec") + 1 :] if not word.startswith("-")]
            if service not in services:
                raise Wrong(f"compose has no service {service!r}; it has {', '.join(services)}")
            self.read(list(words[words.index(inner[0]) :]) if inner else [], folder)
        if "run" in words and IMAGE in words:
            self.read(["vllm", "serve", *words[words.index(IMAGE) + 1 :]], folder)


IMAGE = "vllm-edits"
"""As the documents call what docker/Dockerfile makes; its entry point is `vllm serve`."""


def settings(config: Any) -> None:
    """Wrong for an additional config that holds no settings of ours, or others than there are."""
    try:
        read_settings(config)
    except SettingsError as error:
        raise Wrong(str(error)) from None


def our_command(words: Sequence[str]) -> None:
    """Wrong for a command or an option that there is not. What is missing may be: a page may speak of a part."""
    group: Any = get_command(app)
    names = subcommand(group, list(words))
    command, rest = of(group, names), list(words[1 + len(names) :])
    if hasattr(command, "commands") and rest and not rest[0].startswith("-") and not PLACEHOLDER.fullmatch(rest[0]):
        _raise_unknown(" ".join([*words[: 1 + len(names)], rest[0]]), rest[0], command.commands)
    if command.context_settings.get("ignore_unknown_options"):
        return
    known = {"--help", *(flag for each in command.params for flag in (*each.opts, *each.secondary_opts))}
    for flag in (word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)):
        if flag not in known:
            _raise_unknown(" ".join(words[: 1 + len(names)]) + f" {flag}", flag, known)


def _raise_unknown(what: str, word: str, known: Any) -> NoReturn:
    raise Wrong(f"there is no `{what}`.{nearest(word, known) or ' There are ' + ', '.join(sorted(known))}")


# -- Python and make ---------------------------------------------------------------------------------------------------


def make(words: Sequence[str]) -> None:
    """Wrong for a target or a variable that the Makefile has not, and for what its commands would refuse."""
    makefile = (ROOT / "Makefile").read_text()
    for name in (word.partition("=")[0] for word in words[1:] if re.match(r"[A-Z_]+=", word)):
        if f"$({name})" not in makefile and f"$({name}," not in makefile and f"\n{name} " not in makefile:
            raise Wrong(f"the Makefile has no variable {name}")
    dry = ["make", "-n", "--no-print-directory", "-C", str(ROOT), *words[1:]]
    told = {"PATH": os.environ["PATH"]}  # none of what `make test` was told
    done = subprocess.run(dry, env=told, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Wrong(f"make refuses it: {done.stderr.strip()}")
    for line in done.stdout.replace("\\\n", " ").splitlines():
        # Of a loop of the shell the words are not known before it runs.
        if (found := re.search(r"\bpython3? (.*)", line)) and "$" not in line:
            python(["python", *shlex.split(found[1], comments=True)])


def python(words: Sequence[str]) -> None:
    """Wrong for a module or a file that is not there, and for words that it would refuse."""
    if "-m" in words:
        module, *rest = words[words.index("-m") + 1 :]
        path = source_of(module)
        if path is None:
            raise Wrong(f"there is no module {module}")
        if ROOT in path.parents:
            _refuse_words(module, path, rest)
    elif len(words) > 1 and words[1].endswith(".py"):
        path = ROOT / words[1]
        if not path.is_file() and not list(ROOT.glob(f"*/*/{words[1]}")):
            raise Wrong(f"there is no {words[1]}")


@functools.cache
def source_of(module: str) -> Path | None:
    """The file that `python -m` would run."""
    here = ROOT.joinpath(*module.split("."))
    for path in (here.with_suffix(".py"), here / "__main__.py"):
        if path.is_file():
            return path
    top = module.partition(".")[0]
    # Not `importlib.util.find_spec`: setuptools takes its asking for pip for a run of pip.
    found = None if ROOT.joinpath(top).exists() else PathFinder.find_spec(top)
    return Path(found.origin) if found and found.origin else None


def _refuse_words(module: str, path: Path, words: Sequence[str]) -> None:
    command = _typer_command(module, path)
    if command is not None:
        try:
            command.make_context(module, [str(ROOT) if PLACEHOLDER.fullmatch(word) else word for word in words])
        except _UsageError as error:
            raise Wrong(f"{module} refuses it: {error}") from None
        except typer.Exit:  # --help
            return
    elif path.is_relative_to(ROOT) and ".venv" not in path.parts:  # pip and pytest know their own options
        source = path.read_text()
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            if f'"{flag}"' not in source:
                raise Wrong(f"{module} has no option {flag}")


@functools.cache
def _typer_command(module: str, path: Path) -> Any:
    """The command of a module that has a typer app, its own or one that it imports; else None."""
    if "app()" not in path.read_text():
        return None
    imported = [
        node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and "app" in [each.name for each in node.names]
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch's own imports warn about is not the page's fault
        return get_command(importlib.import_module(imported[0] if imported else module).app)


# -- requests ----------------------------------------------------------------------------------------------------------


class _Told(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Wrong(f"curl: {message}")


def curl(words: Sequence[str], fields_of: Callable[[str], Sequence[str]]) -> None:
    """Wrong for a request that no server with the plugin would take: its path, method, headers or fields."""
    parser = _Told(add_help=False)
    parser.add_argument("urls", nargs="+")
    parser.add_argument("-H", "--header", action="append", default=[])
    parser.add_argument("-d", "--data", "--data-raw", "--json")
    parser.add_argument("-X", "--request")
    parser.add_argument("-o", "--output")
    for flags in (("-i", "--include"), ("-s", "--silent"), ("-S", "--show-error"), ("-f", "--fail"),
                  ("-N", "--no-buffer"), ("--fail-with-body",)):  # fmt: skip
        parser.add_argument(*flags, action="store_true")
    said = parser.parse_intermixed_args(list(words[1:]))
    for each in said.urls:
        url = urlsplit(each if "//" in each else f"http://{each}")
        method = said.request or ("GET" if said.data is None else "POST")
        route = require_route(method, url.path)
        _require_headers([header.partition(":")[0].strip().lower() for header in said.header])
        if said.data is not None:
            _require_body(route, url.path, said.data, fields_of(url.path))


@functools.cache
def our_routes() -> list[APIRoute]:
    routes = router(lambda: None, lambda: None, lambda: None).routes  # type: ignore[arg-type, return-value]
    return [route for route in routes if isinstance(route, APIRoute)]


@functools.cache
def vllms_routes() -> set[tuple[str, str]]:
    """Method and path of every route that the installed vLLM's sources declare."""
    found = {("GET", "/metrics")}  # mounted, and declared nowhere
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    declared = re.compile(r"""@\w+\.(get|post|put|delete)\(\s*"(/[^"]*)\"""")
    for path in Path(spec.submodule_search_locations[0], "entrypoints").rglob("*.py"):
        found |= {(method.upper(), route) for method, route in declared.findall(path.read_text())}
    return found


def require_route(method: str, path: str) -> APIRoute | None:
    """Our route, None for one of vLLM's; Wrong where there is neither."""
    for route in our_routes():
        fits = path == route.path if "{" in path else route.path_regex.match(path)
        if fits and method in route.methods:
            return route
    if (method, path) not in vllms_routes():
        there = sorted({route.path for route in our_routes()} | {each for _, each in vllms_routes()})
        raise Wrong(f"there is no route {method} {path}.{nearest(path, there)}")
    return None


def _require_headers(names: Sequence[str]) -> None:
    for name in names:
        if name not in {*OF_REQUESTS, *_OTHERS_HEADERS}:
            raise Wrong(f"no request has a header {name}.{nearest(name, {*OF_REQUESTS, *_OTHERS_HEADERS})}")


def _require_body(route: APIRoute | None, path: str, data: str, known: Sequence[str]) -> None:
    try:
        body = json.loads(data)
    except ValueError as error:
        raise Wrong(f"its body is no JSON: {error}") from None
    if route is not None and route.body_field is not None:
        try:
            route.body_field.field_info.annotation.model_validate(body)  # type: ignore[union-attr]
        except ValidationError as error:
            raise Wrong(f"its body is refused: {error}") from None
    elif known and (unknown := sorted(set(body) - set(known))):
        raise Wrong(f"{path} has no field {unknown[0]}.{nearest(unknown[0], known)}")
