"""Quantised checkpoints in the format of compressed-tensors, made of ordinary ones. The weights of every projection are
rounded; embeddings, norms and the output head are left as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

Scheme = Literal["int8", "int4"]
"""int8: weights per channel and activations per token. int4: weights alone, in groups of 32 inputs."""
GROUP = 32


def quantise(model: Path, folder: Path, scheme: Scheme) -> Path:
    """A quantised checkpoint of an ordinary one, in `folder`."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    path, config_path = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        levels, scale = _rounded(weight, scheme)
        if scheme == "int8":
            tensors |= {name: levels.to(torch.int8), f"{name}_scale": scale}
        else:
            packed = pack_to_int32(levels.to(torch.int8), 4)
            shape = torch.tensor(weight.shape)
            tensors |= {f"{name}_packed": packed, f"{name}_scale": scale, f"{name}_shape": shape}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    config = json.loads(config_path.read_bytes())
    config_path.write_text(json.dumps({**config, "quantization_config": _described(scheme)}))
    return folder


def _described(scheme: Scheme) -> dict[str, Any]:
    usual = {"type": "int", "symmetric": True}
    groups: dict[str, Any] = {
        "int8": {"weights": {**usual, "num_bits": 8, "strategy": "channel", "dynamic": False},
                 "input_activations": {**usual, "num_bits": 8, "strategy": "token", "dynamic": True}},
        "int4": {"weights": {**usual, "num_bits": 4, "strategy": "group", "group_size": GROUP, "dynamic": False},
                 "input_activations": None},
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "int-quantized" if scheme == "int8" else "pack-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "output_activations": None, **groups[scheme]}},
    }  # fmt: skip


def _rounded(weight: Any, scheme: Scheme) -> tuple[Any, Any]:
    """Whole numbers of the weight's shape, and the scale of each row, or of each group of a row."""
    import torch

    most = 127 if scheme == "int8" else 7
    grouped = weight.reshape(len(weight), 1, -1) if scheme == "int8" else weight.reshape(len(weight), -1, GROUP)
    scale = grouped.abs().amax(-1, keepdim=True) / most
    levels = torch.round(grouped / scale).clamp(-most - 1, most)
    return levels.reshape(weight.shape), scale[..., 0]
