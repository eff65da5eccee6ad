"""Contents of the reservation profiles: entries as they may stand in `reserve`, and numbers of scopes.

Ranks, features and scopes are those that the code of the published methods uses. An entry that fits no site of a model
is left out there, and so is an entry of a kind that is not registered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vllm_edits.edit_store.kinds import KINDS, SCALED, served_per_request
from vllm_edits.edit_store.sites import LAYER_POINTS, READS, Site
from vllm_edits.server_config.settings import Profile, Reserve


class ProfileEntry(NamedTuple):
    """An entry of `reserve`, and the published methods that need it."""

    reserve: Reserve
    methods: str


def _entry(methods: str, kind: str, point: str, **more: Any) -> ProfileEntry:
    # Not validated here: which kinds there are is known only when a profile is read. A test validates all entries.
    return ProfileEntry(Reserve.model_construct(kind=kind, site=f"layers.*.{point}", **more), methods)


STANDARD: Sequence[ProfileEntry] = (
    # Ships and Sahara scale a head's contribution, or by default its queries. Every token, no rank.
    _entry("Ships and Sahara: heads removed", "scale", "attn.z"),
    _entry("Ships and Sahara: heads that attend evenly", "scale", "q.out"),
    # ROCR needs rank one for each concept, ROME for one fact, MEMIT and AlphaEdit for each fact of a batch. 8 is our
    # choice. A model keeps its general abilities for a few dozen edits of this sort (arXiv 2410.18785).
    _entry("ROCR, ROME, MEMIT, AlphaEdit: 8 concepts or facts", "low_rank", "mlp.out", reads="mlp.h", rank=8),
    # The nearest place for a redirection where mlp.h lies inside experts.
    _entry("redirections past the experts of a mixture", "low_rank", "mlp.out", reads="mlp.in", rank=1),
    # heretic takes a direction out of a projection's output: rank 1, or 3 if the norms of rows are kept.
    _entry("abliteration of a weight", "low_rank", "attn.out", reads="attn.z", rank=3),
    # Model Surgery changes chosen rows by one probe, and an in-place stealth edit one row: rank one.
    _entry("Model Surgery, stealth edits in place", "low_rank", "gate.out", reads="mlp.in", rank=1),
    # Abliteration with a weight other than 1 has rank one. LoReFT reads and writes a few directions (4 is our choice),
    # and only in the first and last positions of the prompt: scaled.
    _entry("LoReFT, abliteration in part", "low_rank", "resid", reads="resid", rank=4, features=(SCALED,)),
    # Abliteration removes one direction. LEACE removes one less than there are classes, by an oblique projection: dual.
    # Not onto a subspace: EigenShield alone does that, in a form that is unconfirmed, and keeps many directions.
    _entry("abliteration, LEACE of 5 classes", "subspace_filter", "resid", rank=4, features=("dual",)),
    # A direction in the outputs of heads, as ITI's probes find them, that is taken away and not added.
    _entry("a concept erased from the heads of a layer", "subspace_filter", "attn.z", rank=1),
    # CAA adds a vector after the user's prompt, with a strength: scaled. repeng can keep the norm: renorm.
    _entry("CAA, ActAdd, repeng", "offset", "resid", features=("renorm", SCALED)),
    # LoFiT adds to every token. ITI adds to the last token of each step, with a strength: scaled.
    _entry("ITI, LoFiT", "offset", "attn.z", features=(SCALED,)),
    # A jet-pack block normalises what it reads, and has one neuron for each edit.
    _entry("a jet-pack block (stealth edits)", "gate", "mlp.out", reads="mlp.in", rank=1, features=("normalise",)),
)
"""Entries for nearly every published method, at every layer."""

SCOPES: Mapping[Profile, int] = {"promoted": 0, "standard": 2, "all": 4}
"""Scopes of one version, without what is promoted.

ITI needs most, two: the last token of the prompt, and the generated tokens. `all` has as many for a second method.
"""


def entries(profile: Profile) -> list[Reserve]:
    """Entries of a profile for kinds that are registered. What is promoted is none of them, and comes beside them."""
    if profile == "promoted":
        return []
    if profile == "standard":
        return [entry.reserve for entry in STANDARD if entry.reserve.kind in served_per_request()]
    return list(_everything())


def _everything() -> Iterator[Reserve]:
    """Every kind that is served per request, at every point, for every source, with all of its features."""
    rank = max(entry.reserve.rank for entry in STANDARD)
    for name in served_per_request():
        kind = KINDS[name]
        features, ranked = (*kind.features, SCALED), "rank" in kind.model_fields
        for point in kind.points:
            place, pattern = (
                (Site(0, point), f"layers.*.{point}") if point in LAYER_POINTS else (Site(None, point), point)
            )
            for source in kind.sources(place, READS.get(point, ())):
                yield Reserve(
                    kind=name, site=pattern, reads=source.point, rank=rank if ranked else 1, features=features
                )
