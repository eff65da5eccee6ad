"""The modules of a loaded model behind each site, by the table in `edit_store.architectures`."""

from __future__ import annotations

from typing import Any

from torch import nn

from edit_store.architectures import Architecture, supported
from edit_store.errors import UnsupportedHost
from edit_store.sites import LAYER_POINTS, Site, Widths
from plugin.edited_model import Anchor


def anchors(model: nn.Module, name: str, widths: Widths) -> dict[Site, Anchor]:
    """The module behind every site of `model`. UnsupportedHost names what is missing."""
    architecture = supported(name)
    return {site: _anchor(model, architecture, widths, site) for site in architecture.sites(widths.layers)}


def _anchor(model: nn.Module, architecture: Architecture, widths: Widths, site: Site) -> Anchor:
    try:
        root: Any = model
        if site.layer is not None:
            root = model.get_submodule(architecture.layer_path(site.layer))
        modules = dict(root.named_modules())
        at = architecture.side_of(site.point, widths, modules.__contains__)
        module = modules["logits_processor"] if site.point == "logits" else modules[at.path]
    except (AttributeError, KeyError) as error:
        raise UnsupportedHost(
            f"this vLLM builds {architecture.name} otherwise than expected: no module behind {site} ({error})"
        ) from error
    is_layer = site.point in LAYER_POINTS and at.path == ""
    return Anchor(module, at.side, at.start, widths.of(site.point), is_layer)
