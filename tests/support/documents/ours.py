"""YAML and JSON in documents: which document of ours it is, and whether it is one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tests.support.documents.commands import Reader, Wrong, settings
from vllm_edits.edit_store.bundle import Manifest
from vllm_edits.edit_store.errors import EditsError
from vllm_edits.edit_store.evaluation.suite import SuiteFile
from vllm_edits.edit_store.experiments.document import Experiment
from vllm_edits.edit_store.experiments.state import ExperimentEntry
from vllm_edits.edit_store.storage.store import TagEntry
from vllm_edits.edit_store.trust import TrustPolicy
from vllm_edits.server_config.settings import KEY

Check = Callable[[Any, str, Reader], None]
"""Takes what was read, the text, and who reads commands; raises Wrong."""


def _model(kind: type[BaseModel]) -> Check:
    def check(found: Any, _text: str, _reader: Reader) -> None:
        kind.model_validate_json(json.dumps(found))

    return check


def _experiment(found: Any, _text: str, _reader: Reader) -> None:
    Experiment.parse(found)


def _settings(found: Any, _text: str, _reader: Reader) -> None:
    settings(found)


def _flags_of_vllm(found: Any, text: str, reader: Reader) -> None:
    model = [] if "model" in found else ["MODEL"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "flags.yaml").write_text(text)
        reader.read(["vllm", "serve", *model, "--config", "flags.yaml"], Path(folder))


def _compose(_found: Any, text: str, _reader: Reader) -> None:
    _by_command(text, [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"])


def _prometheus(_found: Any, text: str, _reader: Reader) -> None:
    if promtool := shutil.which("promtool"):
        _by_command(text, [promtool, "check", "config", "--syntax-only"])


def _by_command(text: str, command: list[str]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Wrong((done.stdout + done.stderr).strip())


def _request(found: Any, text: str, reader: Reader) -> None:
    path = "/v1/chat/completions" if "messages" in found else "/v1/completions"
    reader.read(["curl", f"localhost:8000{path}", "-d", text])


def _line_of_a_batch(found: Any, _text: str, reader: Reader) -> None:
    reader.read(["curl", f"localhost:8000{found['url']}", "-d", json.dumps(found["body"])])


KINDS: Mapping[str, tuple[frozenset[str], Check]] = {
    "an experiment": (frozenset({"arms", "model"}), _experiment),
    "an entry of a tag": (frozenset({"previous_sha256", "tag", "version"}), _model(TagEntry)),
    "an entry of the experiments": (frozenset({"previous_sha256", "experiment"}), _model(ExperimentEntry)),
    "a manifest": (frozenset({"schema_version", "edits", "base"}), _model(Manifest)),
    "a trust file": (frozenset({"schema_version", "keys"}), _model(TrustPolicy)),
    "a suite": (frozenset({"measures", "name"}), _model(SuiteFile)),
    "settings": (frozenset({KEY}), _settings),
    "flags of vLLM": (frozenset({"load-format"}), _flags_of_vllm),
    "a compose file": (frozenset({"services"}), _compose),
    "a configuration of Prometheus": (frozenset({"scrape_configs"}), _prometheus),
    "a request": (frozenset({"model", "prompt"}), _request),
    "a chat": (frozenset({"model", "messages"}), _request),
    "a line of a batch": (frozenset({"custom_id", "url", "body"}), _line_of_a_batch),
}
"""Documents by fields of theirs; of two that fit it is the first."""


def check(text: str, reader: Reader) -> str | None:
    """What a text is, None where it is nothing of ours; Wrong where it would be refused."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Wrong(f"neither YAML nor JSON: {error}") from None
    if not isinstance(found, Mapping):
        return None
    for kind, (fields, check_it) in KINDS.items():
        if fields <= found.keys():
            try:
                check_it(found, text, reader)
            except (EditsError, ValidationError, Wrong) as error:
                raise Wrong(f"it is {kind}, and would be refused: {error}") from None
            return kind
    return None
