"""Projections that a server reserves for versions in its weights, and those that get a bias. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from vllm_edits.edit_store.architectures import Architecture
from vllm_edits.edit_store.bundle import Manifest
from vllm_edits.edit_store.errors import SettingsError
from vllm_edits.edit_store.sites import Site, Widths
from vllm_edits.plugin.weights.weight_form import touched
from vllm_edits.server_config.settings import ReserveWeight

WeightsReservation = Mapping[Site, bool]
"""Projections by their output, each with True if it gets a bias where the model has none."""


def asked_for(reserve: Iterable[ReserveWeight], architecture: Architecture, widths: Widths) -> WeightsReservation:
    """Expand patterns over a model's projections. SettingsError when a pattern fits none."""
    every, reserved, unmatched = list(_every(architecture, widths)), dict[Site, bool](), []
    for item in reserve:
        found = [site for site in every if fnmatchcase(str(site), item.site)]
        if not found:
            unmatched.append(
                f"edits.weights_reserve: {item.site!r} fits no projection; they are named by what they give: "
                f"{', '.join(architecture.projections())}, in layers 0 to {widths.layers - 1}"
            )
        for site in found:
            reserved[site] = reserved.get(site, False) or item.bias
    if unmatched:
        raise SettingsError("\n".join(unmatched))
    return reserved


def for_version(manifest: Manifest, architecture: Architecture) -> WeightsReservation:
    """Projections that one version changes."""
    reserved: dict[Site, bool] = {}
    for edit in manifest.edits:
        for site in touched(edit, architecture):
            reserved[site] = reserved.get(site, False) or edit.adds_constant
    return reserved


def usual(architecture: Architecture, widths: Widths) -> WeightsReservation:
    """Every projection of every layer, with the biases that the model has."""
    return dict.fromkeys(_every(architecture, widths), False)


def to_settings(reserved: WeightsReservation) -> list[dict[str, object]]:
    """The reservation as settings, one entry for each projection."""
    return [{"site": str(site), "bias": bias} for site, bias in sorted(reserved.items())]


def bytes_kept(reserved: WeightsReservation, architecture: Architecture, widths: Widths, itemsize: int) -> int:
    """Bytes of the reserved weights: the copy that a CPU server keeps of them, and the most that a patch takes."""
    projections = architecture.projections()
    return sum(widths.of(site.point) * widths.of(projections[site.point]) * itemsize for site in reserved)


def _every(architecture: Architecture, widths: Widths) -> Iterable[Site]:
    return (Site(layer, point) for layer in range(widths.layers) for point in architecture.projections())
