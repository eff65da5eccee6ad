"""Finds the files of the base model, after vLLM has fetched them, and makes vLLM load exactly these files.

vLLM itself loads every *.safetensors file if there is no index, and prefers consolidated.safetensors to the other
files. Here it loads only the files of `base_model.weight_files`. So the identified model is the served model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from vllm_edits.edit_store.base_model import CONFIG_FILE, identify, read_config, weight_files
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.errors import UnsupportedHost

FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor")
"""vLLM's load formats for safetensors files on a disk."""
_OTHER_LAYOUT = "consolidated*.safetensors"
"""A second copy of the weights in some repositories."""


def loader_of(load_config: LoadConfig, load_format: str) -> BaseModelLoader:
    """vLLM's loader for a format. UnsupportedHost if it is unknown which files the format loads."""
    if load_format not in FORMATS:
        raise UnsupportedHost(
            f"edits.inner_load_format = {load_format!r} is not supported, because it is unknown which files it loads. "
            f"Use {', '.join(FORMATS)}, with the model in a folder or a repository"
        )
    ignored = load_config.ignore_patterns or []
    found: Any = get_model_loader(
        dataclasses.replace(
            load_config,
            load_format="hf" if load_format == "auto" else load_format,
            ignore_patterns=[*([ignored] if isinstance(ignored, str) else ignored), _OTHER_LAYOUT],
        )
    )
    found.__class__ = _reading_own_files(found.__class__)
    loader: BaseModelLoader = found
    return loader


@functools.cache
def _reading_own_files(cls: type[Any]) -> type[DefaultModelLoader]:
    class OwnFiles(cls):  # type: ignore[misc]
        """A loader that reads only the weight files of the checkpoint."""

        def _prepare_weights(self, *args: Any, **kwargs: Any) -> Any:
            folder, _, _, *more = super()._prepare_weights(*args, **kwargs)
            return folder, [str(path) for path in weight_files(Path(folder))], True, *more

    return OwnFiles


def fetched(loader: Any, model_config: Any) -> Path:
    """The folder with the base model's weights, downloaded if needed. UnsupportedHost if they are not on a disk."""
    if streamed := model_config.model_weights:
        raise UnsupportedHost(
            f"{streamed} is streamed from object storage, where its files cannot be identified. Copy it to a disk and "
            "serve that folder"
        )
    folder, *_ = loader._prepare_weights(model_config.model, None, model_config.revision, False, None)  # noqa: SLF001
    return Path(folder)


def base_of(model_config: Any, folder: Path) -> BaseModelRef:
    """The identity of the model that vLLM runs: the weights in `folder`, with vLLM's present config."""
    return identify(folder, name=model_config.model, config=_config(model_config, folder))


def _config(model_config: Any, folder: Path) -> Mapping[str, Any]:
    """The model's config.json from vLLM's source, with the changes of --hf-overrides."""
    overrides = model_config.hf_overrides or {}
    if not isinstance(overrides, Mapping):
        raise UnsupportedHost("--hf-overrides is a function, so its changes are unknown. Give a JSON object")
    named = model_config.hf_config_path
    if named is None and (folder / CONFIG_FILE).is_file():
        return {**read_config(folder), **overrides}
    found = get_hf_file_to_dict(CONFIG_FILE, named or model_config.model, model_config.revision)
    if found is None:
        raise UnsupportedHost(
            f"{named or model_config.model} has no {CONFIG_FILE}, which edits need. Serve a model that has it"
        )
    return {**found, **overrides}
