"""Which kinds, at which sites, up to which rank a server has room for. Fixed when it starts; pure.

A compiled graph reads preallocated tensors, so what is not reserved cannot be served later, and is refused with the
setting to raise. What is not reserved costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from edit_store.edits import KINDS, Edit
from edit_store.errors import Reason, SettingsError
from edit_store.sites import POINTS, Site, Widths
from server_config.settings import Reserve

DEFAULT_RANK = 1


@dataclass(frozen=True)
class Reservation:
    """Rank by (kind, site)."""

    ranks: Mapping[tuple[str, Site], int]

    @classmethod
    def for_edits(cls, edits: Iterable[Edit]) -> Reservation:
        """Exactly what these edits need."""
        ranks: dict[tuple[str, Site], int] = {}
        for edit in edits:
            key = edit.kind, Site.parse(edit.site)
            ranks[key] = max(edit.capacity, ranks.get(key, 0))
        return cls(ranks)

    @classmethod
    def for_everything(cls, widths: Widths) -> Reservation:
        """Every kind at every site where it has a meaning: for a server that starts with an empty store."""
        return cls(
            {
                (kind, Site(layer, point)): DEFAULT_RANK
                for kind, edit in KINDS.items()
                for point in edit.points
                for layer in range(widths.layers)
            }
        )

    @classmethod
    def from_settings(cls, reserve: Iterable[Reserve], widths: Widths) -> Reservation:
        """Expand patterns over a model's sites. SettingsError when a pattern fits no place of its kind."""
        ranks: dict[tuple[str, Site], int] = {}
        unmatched = []
        for item in reserve:
            sites = [
                Site(layer, point)
                for point in KINDS[item.kind].points
                for layer in range(widths.layers)
                if fnmatchcase(str(Site(layer, point)), item.site)
            ]
            if not sites:
                unmatched.append(
                    f"edits.reserve: {item.kind} at {item.site!r} fits no site; {item.kind} can stand at "
                    f"{', '.join(KINDS[item.kind].points)} of layers 0 to {widths.layers - 1}"
                )
            for site in sites:
                ranks[item.kind, site] = max(item.rank, ranks.get((item.kind, site), 0))
        if unmatched:
            raise SettingsError("\n".join(unmatched))
        return cls(ranks)

    def missing(self, edits: Iterable[Edit]) -> list[Reason]:
        """Why these edits do not fit, each with the setting that would make room."""
        reasons = []
        for edit in edits:
            have = self.ranks.get((edit.kind, Site.parse(edit.site)), 0)
            if have >= edit.capacity:
                continue
            found = f"rank {have} is reserved" if have else "nothing is reserved there"
            wish = f'{{"kind": "{edit.kind}", "site": "{edit.site}", "rank": {edit.capacity}}}'
            reasons.append(
                Reason(
                    "capacity",
                    f"{edit.kind} of rank {edit.capacity} at {edit.site}: {found}. Add {wish} to edits.reserve "
                    "and restart, or restart with edits.reserve unset to make room for what is promoted",
                )
            )
        return reasons

    def to_settings(self) -> list[dict[str, Any]]:
        """The same as explicit settings, sorted: one reservation has one spelling."""
        return [
            {"kind": kind, "site": str(site), "rank": rank}
            for (kind, site), rank in sorted(self.ranks.items(), key=lambda item: (item[0][1], item[0][0]))
        ]

    def sites(self) -> list[Site]:
        """Every reserved site once, in model order."""
        order = {point: index for index, point in enumerate(POINTS)}
        return sorted({site for _, site in self.ranks}, key=lambda site: (site.layer, order[site.point]))

    def __str__(self) -> str:
        by_kind: dict[str, list[int]] = {}
        for (kind, _), rank in self.ranks.items():
            by_kind.setdefault(kind, []).append(rank)
        parts = [f"{kind} at {len(ranks)} site(s) up to rank {max(ranks)}" for kind, ranks in sorted(by_kind.items())]
        return "; ".join(parts) or "nothing"
