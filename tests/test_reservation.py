"""What a server has room for, and what an edit without room is told."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edit_store import LowRank, Offset, Scale, Site, SubspaceFilter
from edit_store.edits import KINDS
from edit_store.errors import SettingsError
from plugin.reservation import Reservation
from server_config.settings import Reserve
from tests.fakes import WIDTHS, cheaply

EDITS: list[Any] = [
    LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=2),
    LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=5),
    Scale(site="layers.2.attn.z"),
    SubspaceFilter(site="layers.0.resid", rank=3),
    Offset(site="layers.0.resid"),
]


def reserve(*items: tuple[str, str, int]) -> Reservation:
    return Reservation.from_settings([Reserve(kind=kind, site=site, rank=rank) for kind, site, rank in items], WIDTHS)


def test_room_for_given_edits_is_exactly_theirs() -> None:
    """The largest rank of each kind at each site, and nothing elsewhere."""
    made = Reservation.for_edits(EDITS)
    assert made.ranks == {
        ("low_rank", Site(1, "mlp.out")): 5,
        ("scale", Site(2, "attn.z")): 1,
        ("subspace_filter", Site(0, "resid")): 3,
        ("offset", Site(0, "resid")): 1,
    }
    assert Reservation.for_edits(reversed(EDITS)) == made
    assert made.missing(EDITS) == []


def test_patterns_expand_over_the_layers_where_a_kind_has_a_meaning() -> None:
    """`layers.*` of an offset is the residual stream of every layer, and no other point."""
    assert reserve(("offset", "layers.*", 1)).sites() == [Site(layer, "resid") for layer in range(3)]
    assert reserve(("low_rank", "layers.1.mlp.out", 4)).ranks == {("low_rank", Site(1, "mlp.out")): 4}
    overlapping = reserve(
        ("low_rank", "layers.*.mlp.out", 2), ("low_rank", "layers.1.mlp.out", 7), ("low_rank", "*", 3)
    )
    assert [overlapping.ranks["low_rank", Site(layer, "mlp.out")] for layer in range(3)] == [3, 7, 3]


def test_patterns_that_fit_nothing_are_refused_all_at_once() -> None:
    """A misspelt site would otherwise be found out at the first promotion."""
    with pytest.raises(SettingsError) as refusal:
        reserve(("offset", "layers.*.mlp.out", 1), ("scale", "layers.9.attn.z", 1), ("low_rank", "*", 1))
    assert "offset at 'layers.*.mlp.out' fits no site; offset can stand at resid of layers 0 to 2" in str(refusal.value)
    assert "scale at 'layers.9.attn.z' fits no site" in str(refusal.value)
    assert "low_rank" not in str(refusal.value)


def test_an_empty_store_reserves_every_kind_wherever_it_has_a_meaning() -> None:
    everything = Reservation.for_everything(WIDTHS)
    assert everything.ranks == {
        (kind, Site(layer, point)): 1 for kind, edit in KINDS.items() for point in edit.points for layer in range(3)
    }
    assert everything.missing([Scale(site="layers.0.attn.z"), Offset(site="layers.2.resid")]) == []


sites_and_ranks = st.dictionaries(
    st.sampled_from(
        [(kind, Site(layer, point)) for kind, edit in KINDS.items() for point in edit.points for layer in range(3)]
    ),
    st.integers(1, 8),
)


@cheaply
@given(sites_and_ranks)
def test_a_reservation_has_one_spelling_as_settings(ranks: dict[tuple[str, Site], int]) -> None:
    """What a server resolved is written into its config: it must read back as the same, in the same order."""
    made = Reservation(ranks)
    spelled = made.to_settings()
    assert Reservation.from_settings([Reserve(**item) for item in spelled], WIDTHS) == made
    assert Reservation(dict(reversed(ranks.items()))).to_settings() == spelled
    assert json.loads(json.dumps(spelled)) == spelled


@cheaply
@given(sites_and_ranks)
def test_the_advice_in_a_refusal_makes_room(ranks: dict[tuple[str, Site], int]) -> None:
    """Each reason names a setting to add; with all of them added nothing is missing any more."""
    have = Reservation(ranks)
    reasons = have.missing(EDITS)
    assert {reason.code for reason in reasons} <= {"capacity"}
    advice = [json.loads(re.findall(r"Add (\{.*?\})", reason.message)[0]) for reason in reasons]
    mended = Reservation.from_settings([Reserve(**item) for item in [*have.to_settings(), *advice]], WIDTHS)
    assert mended.missing(EDITS) == []


def test_a_refusal_says_what_is_reserved() -> None:
    few = reserve(("low_rank", "layers.1.mlp.out", 2))
    messages = [reason.message for reason in few.missing(EDITS)]
    assert messages[0].startswith("low_rank of rank 5 at layers.1.mlp.out: rank 2 is reserved")
    assert messages[1].startswith("scale of rank 1 at layers.2.attn.z: nothing is reserved there")
    assert len(messages) == 4


def test_it_can_be_read_in_one_line() -> None:
    assert str(Reservation({})) == "nothing"
    assert str(Reservation.for_edits(EDITS)) == (
        "low_rank at 1 site(s) up to rank 5; offset at 1 site(s) up to rank 1; "
        "scale at 1 site(s) up to rank 1; subspace_filter at 1 site(s) up to rank 3"
    )


def test_sites_come_once_in_model_order() -> None:
    """Slot tensors are made in this order on every worker, so their digests can be compared."""
    order = ["layers.0.resid", "layers.1.mlp.out", "layers.2.attn.z"]
    assert [str(site) for site in Reservation.for_edits(EDITS).sites()] == order
    assert [str(site) for site in Reservation.for_edits(reversed(EDITS)).sites()] == order
