"""A folder with what the documents speak of, and a shell in it whose commands are this tree's."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from loadtests.harness.object_servers import moto
from tests.support.bundles import bundle_of, publish, random_pairs
from tests.support.documents import ready
from tests.support.documents.commands import Reader
from tests.support.documents.repository import ROOT
from vllm_edits.edit_store import BaseModelRef, Bundle, EditStore, identify
from vllm_edits.plugin.experiments.exposure_log import ExposureLog
from vllm_edits.plugin.experiments.records import Exposure

MODEL, STORE = "MODEL", "store"
CONFIGURATION = ("docker", "server_config")
"""Folders of the repository whose files commands name."""
TOOLS = ("cat", "chmod", "cp", "head", "ls", "mkdir", "mv", "rm", "sed", "sleep", "sort", "tail", "tar", "tee", "wc")
"""Programs that a block may use besides ours."""
SECONDS = 120
"""How long a block may take."""
_ANY = "any-command"
_EXAMPLE = re.compile(r"4f1c9a[0-9a-f]*(?P<cut>…?)")
"""How the documents abbreviate the version that they promote."""
_BUCKET = re.compile(r"s3://(?P<bucket>[a-z0-9.-]+)(?:/[\w./-]+)?")
_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32, "dtype": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Noted:
    """A command of a block: with its code where it was run, with None where it was only read."""

    words: list[str]
    line: int
    code: int | None


@dataclass(frozen=True)
class Ran:
    """How a block ended."""

    code: int
    line: int
    """the one that ended it, within the block"""
    said: str
    noted: list[Noted]


class World:
    """What all sandboxes share: the process that answers for `vllm-edits`, bundles, and buckets if a page has them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = Path(tempfile.mkdtemp(prefix="documents-"), "ready")  # a socket's path must be short
        self._process = subprocess.Popen(
            [sys.executable, ready.__file__, "serve", str(self.socket)], cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        )  # fmt: skip
        self.reader = Reader(self.ask)
        self.model = _tiny_model(folder / MODEL)
        base = identify(self.model, cache=folder / "cache")
        self.earlier, self.polite, self.safe = _polite(base, 1), _polite(base, 2), _safe(base)
        self._commands = {name: self._path(name) for name in ("run", "read")}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.socket.parent)

    def ask(self, words: Sequence[str], folder: Path) -> tuple[int, str]:
        """Have the ready process run words; its code, and what it said."""
        self._wait()
        with tempfile.TemporaryFile() as said:
            told = {**os.environ, ready.NOTES: os.devnull}
            code = ready.ask(str(self.socket), list(words), str(folder), told, [0, said.fileno(), said.fileno()])
            said.seek(0)
            return code, said.read().decode(errors="replace")

    def _wait(self) -> None:
        end = time.monotonic() + SECONDS
        while not self.socket.exists():
            assert self._process.poll() is None, "the process for commands ended"
            assert time.monotonic() < end, "the process for commands did not begin"
            time.sleep(0.05)

    def _path(self, way: str) -> str:
        """A PATH: our commands alone, or beside the tools that blocks may use."""
        folder = self.folder / f"commands to {way}"
        folder.mkdir()
        for name in (*self.reader.known, _ANY):
            command = folder / name
            named = "" if name == _ANY else name
            command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{ready.__file__}" {named} "$@"\n')
            command.chmod(0o755)
        for name in TOOLS if way == "run" else ():
            tool = folder / name
            tool.write_text(_TOOL.format(path=shutil.which(name) or f"no-{name}", name=name))
            tool.chmod(0o755)
        return str(folder)

    def sandbox(self, folder: Path, files: Mapping[str, str], environment: Mapping[str, str]) -> Sandbox:
        """A new one, with files beside what every one has."""
        self._wait()
        shutil.copytree(self._template, folder)
        for name, text in files.items():
            (folder / name).write_text(self.spoken(text))
        environment = {"HOME": str(folder / "home"), "LANG": "C.UTF-8", "COLUMNS": "200", **environment}
        return Sandbox(self, folder, environment)

    @functools.cached_property
    def _template(self) -> Path:
        """What pages take for granted: a store in which `polite` was promoted before, a model, bundles, requests."""
        folder = self.folder / "template"
        for name in CONFIGURATION:
            shutil.copytree(ROOT / name, folder / name)
        shutil.copytree(self.model, folder / MODEL)
        self.polite.save(folder / "polite")
        self.safe.save(folder / "safe")
        self.fill(str(folder / STORE))
        _write_exposures(folder / "exposures", {"control": self.earlier.version, "treatment": self.polite.version})
        (folder / "prompts.jsonl").write_text('{"prompt": "Dear customer,"}\n')
        request = {"custom_id": "1", "url": "/v1/completions", "body": {"model": "polite", "prompt": "Dear customer,"}}
        (folder / "requests.jsonl").write_text(json.dumps(request) + "\n")
        return folder

    def fill(self, url: str) -> None:
        """Make a store with what documents take for granted."""
        store = EditStore(url, create=True)
        publish(store, self.earlier)
        publish(store, self.safe)
        store.publish(self.polite)

    def spoken(self, text: str) -> str:
        """A text with the digits of a version that there is, in the place of the example's."""
        return _EXAMPLE.sub(lambda found: self.polite.version[: None if found["cut"] else len(found[0])], text)

    @contextmanager
    def buckets(self, text: str, patch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
        """The environment that reaches the stores in buckets that a text speaks of; nothing where it speaks of none."""
        urls = {found[0]: found["bucket"] for found in _BUCKET.finditer(text)}
        if not urls:
            yield {}
            return
        with moto(self.folder) as environment, patch.context() as here:
            for bucket in set(urls.values()):
                httpx.put(f"{environment['AWS_ENDPOINT_URL']}/{bucket}").raise_for_status()
            for name, value in environment.items():
                here.setenv(name, value)
            for url in urls:
                self.fill(url)
            yield environment


@dataclass
class Sandbox:
    """A folder, and the environment as the blocks so far have left it."""

    world: World
    folder: Path
    environment: Mapping[str, str]

    def run(self, text: str, *, only_read: bool = False) -> Ran:
        """Run a block, or have each of its commands noted and none run. Ends at the first that fails."""
        here = self.world.folder / "block"
        notes, end, left = (here.with_suffix(f".{each}") for each in ("notes", "end", "left"))
        for path in (notes, end, left):
            path.write_text("")
        here.write_text(self.world.spoken(text))
        before = here.with_suffix(".before")
        before.write_text(_READ if only_read else _RUN)
        told = {
            **self.environment, "BASH_ENV": str(before), "DOCUMENT_END": str(end), "DOCUMENT_LEFT": str(left),
            "PATH": self.world._commands["read" if only_read else "run"], ready.NOTES: str(notes),
            ready.SOCKET: str(self.world.socket), **({ready.ONLY_READ: "1"} if only_read else {}),
        }  # fmt: skip
        try:
            done = subprocess.run(
                ["/bin/bash", str(here)], cwd=self.environment.get("PWD", self.folder), env=told, timeout=SECONDS,
                check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Ran(124, 0, f"it took longer than {SECONDS} s", [])
        if not only_read and left.read_text():
            pairs = (each.partition("=") for each in left.read_text().split("\0") if each)
            kept = {name: value for name, _, value in pairs if not name.startswith(("DOCUMENT_", "BASH_"))}
            self.environment = {name: value for name, value in kept.items() if name not in ("PATH", "_", "SHLVL")}
        noted = [Noted(**json.loads(line)) for line in notes.read_text().splitlines()]
        return Ran(done.returncode, int(end.read_text() or 0), done.stdout, noted)


# The shell itself is silent about one that fails on the left of `&&`.
_TOOL = """#!/bin/sh
{path} "$@" && exit 0
code=$?
echo '{{"words": ["{name}"], "line": '"$DOCUMENT_LINE"', "code": '$code'}}' >> "$DOCUMENT_NOTES"
exit $code
"""
_COMMON = """
unset BASH_ENV
trap 'export DOCUMENT_LINE=$LINENO' DEBUG
trap 'echo $LINENO > "$DOCUMENT_END"' ERR
"""
_RUN = f"""{_COMMON}
set -Eeuo pipefail
command_not_found_handle() {{ {_ANY} "$@"; return 127; }}
trap '/usr/bin/env -0 > "$DOCUMENT_LEFT"' EXIT
"""
_READ = f"""{_COMMON}
cd() {{ :; }}
command_not_found_handle() {{ {_ANY} "$@"; }}
"""


def _tiny_model(folder: Path) -> Path:
    """A checkpoint that can be told apart and measured, but not run."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    save_file({"model.norm.weight": np.ones(16, np.float32)}, folder / "model.safetensors")
    return folder


def _polite(base: BaseModelRef, seed: int) -> Bundle:
    pairs = [*random_pairs("low_rank", 0, base.widths, seed), *random_pairs("offset", 1, base.widths, seed)]
    return bundle_of("polite", base, pairs)


def _safe(base: BaseModelRef) -> Bundle:
    return bundle_of("safe", base, random_pairs("scale", 2, base.widths, 3))


def _write_exposures(folder: Path, versions: Mapping[str, str]) -> None:
    """What servers with the documents' experiment would have written in its first phase."""
    log = ExposureLog(folder, 1 << 20)
    for number in range(40):
        arm = ("control", "treatment")[number % 2]
        known: dict[str, Any] = {
            "source": "user", "chosen": "hash", "outcome": "ok", "prompt_tokens": 12, "output_tokens": 40,
            "seconds": 1.2, "first_token_seconds": 0.1, "seconds_per_token": 0.02, "empty": False, "looping": False,
            "corrupted": False,
        }  # fmt: skip
        log.write(
            Exposure(at=datetime.now(UTC), request=str(number), experiment="milder", phase=1, arm=arm,
                     version=versions[arm], unit=f"unit {number}", **known)
        )  # fmt: skip
    log.close()
