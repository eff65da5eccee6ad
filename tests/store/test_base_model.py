"""Which base model lies in a folder: the weights that are loaded, and what of a config says how they compute."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config.load import LoadConfig

from vllm_edits.edit_store import identify
from vllm_edits.edit_store.base_model import CONFIG_FILE, INDEX_FILE, weight_files
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.edit_store.verify import base_mismatch
from vllm_edits.plugin.vllm_host import base_files


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def sharded(folder: Path) -> Path:
    """The same checkpoint in two files with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names, where = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": where}))
    (folder / "model.safetensors").unlink()
    return folder


STRAY = ("consolidated.safetensors", "adapter_model.safetensors", "optimizer.safetensors")


@pytest.mark.parametrize("form", ["one file", "shards", "shards without an index"])
def test_files_beside_the_weights_do_not_count(folder: Path, form: str) -> None:
    """And vLLM's own loader, which would read them all, reads the model's."""
    if form != "one file":
        sharded(folder)
    if form == "shards without an index":
        (folder / INDEX_FILE).unlink()
    before, weights = identify(folder), weight_files(folder)
    for name in STRAY:
        shutil.copy(weights[0], folder / name)
    assert identify(folder) == before
    loader: Any = base_files.loader_of(LoadConfig(), "auto")
    model = SimpleNamespace(model=str(folder), revision=None, model_weights="")
    assert base_files.fetched(loader, model) == folder
    for patterns in (True, False):
        _, files, safetensors, *_ = loader._prepare_weights(str(folder), None, None, patterns, None)
        assert (sorted(map(Path, files)), safetensors) == (weights, True)
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    _, alone, *_ = DefaultModelLoader(LoadConfig())._prepare_weights(str(folder), None, None, True, None)
    assert sorted(map(Path, alone)) != weights, "negative control: vLLM alone reads another list"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "found none"),
        (lambda folder: (folder / CONFIG_FILE).unlink(), "expected config.json with a JSON object in"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), "is not JSON"),
        (lambda folder: (folder / CONFIG_FILE).write_text("[]"), "expected config.json with a JSON object in"),
        (lambda folder: (sharded(folder) / "model-00002-of-00002.safetensors").unlink(),
         "names model-00002-of-00002.safetensors, but"),
        (lambda folder: [(folder / "model.safetensors").rename(folder / "a.safetensors"),
                         shutil.copy(folder / "a.safetensors", folder / "b.safetensors")],
         "found a.safetensors, b.safetensors"),
    ],
)  # fmt: skip
def test_a_folder_without_a_clear_checkpoint_is_refused(folder: Path, spoil: Any, said: str) -> None:
    spoil(folder)
    with pytest.raises(UnsupportedHost, match=said):
        identify(folder)


def rewritten(folder: Path, text: str) -> Any:
    (folder / CONFIG_FILE).write_text(text)
    return identify(folder)


def test_a_config_in_another_form_is_the_same_model(folder: Path) -> None:
    """Key order, spaces, line ends, the name of dtype, who wrote it. Weights that differ in one byte are not."""
    before = identify(folder)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config.pop("transformers_version", None)
    renamed = {("torch_dtype" if key == "dtype" else key): value for key, value in config.items()}
    for text in (
        json.dumps(dict(reversed(config.items()))), json.dumps(config, indent=8).replace("\n", "\r\n"),
        json.dumps({**renamed, "transformers_version": "9.9", "use_cache": False, "_name_or_path": "elsewhere"}),
        json.dumps({key: float(value) if type(value) is int else value for key, value in config.items()}),
    ):  # fmt: skip
        assert base_mismatch(before, rewritten(folder, text)) == []
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    assert "model.safetensors differ(s)" in base_mismatch(before, identify(folder))[0].message


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 3}, {"rms_norm_eps": 0.1}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}},
     {"hidden_act": "relu"}, {"a_key_of_a_later_version": 1}, {"odd": float("inf")}, {"odd": 2**70}],
)  # fmt: skip
def test_a_config_that_computes_otherwise_is_another_model(folder: Path, change: dict[str, Any]) -> None:
    """Also where it is --hf-overrides that says so, or a config from elsewhere."""
    before = identify(folder)
    model = SimpleNamespace(
        model=str(folder), revision=None, model_weights="", hf_overrides=change, hf_config_path=None
    )
    config = json.loads((folder / CONFIG_FILE).read_text())
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / CONFIG_FILE).write_text(json.dumps({**config, **change}))
    named = SimpleNamespace(**{**vars(model), "hf_overrides": {}, "hf_config_path": str(elsewhere)})
    found = [rewritten(folder, json.dumps({**config, **change}))]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    found += [base_files.base_of(each, folder) for each in (model, named)]
    for each in found:
        assert "config.json differ(s)" in base_mismatch(before, each)[0].message
        assert each.files == found[0].files
    same = SimpleNamespace(**{**vars(model), "hf_overrides": {"hidden_act": config["hidden_act"]}})
    assert base_files.base_of(same, folder).files == before.files


@pytest.mark.parametrize("load_format", ["dummy", "runai_streamer", "pt", "tensorizer", "edits", "nonsense"])
def test_a_load_format_whose_files_are_unknown_is_refused(load_format: str) -> None:
    with pytest.raises(UnsupportedHost, match=f"edits.inner_load_format = '{load_format}'"):
        base_files.loader_of(LoadConfig(), load_format)


def test_a_model_that_is_streamed_and_overrides_by_a_function_are_refused(folder: Path) -> None:
    model = SimpleNamespace(model=str(folder), model_weights="s3://bucket/model", hf_overrides=lambda each: each)
    with pytest.raises(UnsupportedHost, match="is streamed from object storage"):
        base_files.fetched(None, model)
    with pytest.raises(UnsupportedHost, match="--hf-overrides is a function"):
        base_files.base_of(model, folder)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes a user that no passwd knows")
@pytest.mark.parametrize("home", [None, "", "/nonexistent", "another user's"])
def test_a_process_without_a_home_has_a_cache_of_its_own(folder: Path, open_to_all: Path, home: str | None) -> None:
    """Containers run users that no passwd knows, and some have no home: what is remembered is then kept in /tmp."""
    code = """
import os, sys
from pathlib import Path
from vllm_edits.edit_store import identify
from vllm_edits.edit_store.reading.cache import NodeCache
identify(Path(sys.argv[1]), cache=Path(sys.argv[2]))  # imports what that user may not read
os.setgid(54321), os.setuid(54321)
identify(Path(sys.argv[1]))
print(NodeCache().folder)
"""
    temporary, model, known = open_to_all / "temporary", open_to_all / "model", open_to_all / "known"
    shutil.copytree(folder, model)
    for each in (temporary, known):
        each.mkdir()
    for each in (temporary, known, model, *model.iterdir()):
        each.chmod(0o777)
    if home == "another user's":
        (open_to_all / home).mkdir(mode=0o700)
        home = str(open_to_all / home)
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME")}
    environment |= {"TMPDIR": str(temporary), **({} if home is None else {"HOME": home})}
    command = [sys.executable, "-c", code, str(model), str(known)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    made = Path(ran.stdout.strip())
    assert made.is_relative_to(temporary)
    assert made.stat().st_mode & 0o777 == 0o700
