"""Where each site lives in vLLM's own modules: one entry per architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from edit_store.errors import UnsupportedHost
from edit_store.sites import Site, Widths
from plugin.edited_model import Anchor
from plugin.edited_site import Sizes

_WHOLE_LAYER = ""


@dataclass(frozen=True)
class Layout:
    """Paths of an architecture: the list of decoder layers, and the module in a layer that owns each point.

    A projection owns the point before it and the point after it; the whole layer owns the residual stream.
    """

    layers: str
    owners: Mapping[str, str]


_LLAMA = Layout(
    layers="model.layers",
    owners={
        "attn.z": "self_attn.o_proj",
        "attn.out": "self_attn.o_proj",
        "mlp.h": "mlp.down_proj",
        "mlp.out": "mlp.down_proj",
        "resid": _WHOLE_LAYER,
    },
)

LAYOUTS: dict[str, Layout] = {"LlamaForCausalLM": _LLAMA}


def anchors(model: nn.Module, architecture: str, widths: Widths) -> dict[Site, Anchor]:
    """The module behind every site of `model`. UnsupportedHost names what is missing."""
    layout = LAYOUTS.get(architecture)
    if layout is None:
        raise UnsupportedHost(
            f"architecture {architecture} is not supported; supported: {', '.join(LAYOUTS)}. "
            "A new one is an entry in plugin/vllm_host/architectures.py"
        )
    found: dict[Site, Anchor] = {}
    try:
        layers: Any = model.get_submodule(layout.layers)
        for number, layer in enumerate(layers):
            for point, path in layout.owners.items():
                module = layer.get_submodule(path)
                reads = widths.of({"attn.out": "attn.z", "mlp.out": "mlp.h"}.get(point, point))
                sizes = Sizes(reads, widths.of(point), widths.heads)
                found[Site(number, point)] = Anchor(module, path == _WHOLE_LAYER, sizes)
    except AttributeError as error:
        raise UnsupportedHost(f"this vLLM builds {architecture} otherwise than expected: {error}") from error
    return found
