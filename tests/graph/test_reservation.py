"""The reservation of a server, and the refusal of an edit that does not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.proofs.parity import every_edit
from tests.support.fakes import BASE, WIDTHS, cheaply
from tests.support.reserved import Version
from vllm_edits.edit_store import Gate, LowRank, Offset, Scale, Scope, Site, Strength, SubspaceFilter, WeightDelta
from vllm_edits.edit_store.architectures import ARCHITECTURES
from vllm_edits.edit_store.errors import SettingsError
from vllm_edits.plugin.graph.reservation import Capacity, EditGroup, Reservation, edit_groups
from vllm_edits.server_config.settings import Reserve

LLAMA = ARCHITECTURES[BASE.architecture]
EDITS: list[Any] = [
    LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=2),
    LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.in", rank=5),
    Scale(site="layers.2.attn.z"),
    SubspaceFilter(site="layers.0.resid", rank=3),
    Offset(site="layers.0.resid", renorm=True),
    Gate(site="layers.1.mlp.out", reads="layers.1.mlp.in", rank=2, normalise=True),
]


def reserved_for(*versions: Sequence[Any]) -> Reservation:
    return Reservation.for_versions(map(Version, versions))


def at(kind: str, site: str, reads: str | None = None, index: int = 0) -> EditGroup:
    return EditGroup(Site.parse(site), kind, Site.parse(reads or site), index)


def capacity(rank: int, *features: str) -> Capacity:
    return Capacity(rank, frozenset(features))


def reserve(*items: dict[str, Any]) -> Reservation:
    return Reservation.from_settings([Reserve(**item) for item in items], LLAMA, WIDTHS)


def test_the_reservation_for_given_versions_is_exactly_theirs() -> None:
    """The largest rank at each place and every feature asked for, and nothing elsewhere."""
    larger = LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=4)
    made = reserved_for(EDITS, [larger])
    assert made.capacities == {
        at("low_rank", "layers.1.mlp.out", "layers.1.mlp.h"): capacity(4),
        at("low_rank", "layers.1.mlp.out", "layers.1.mlp.in"): capacity(5),
        at("scale", "layers.2.attn.z"): capacity(1),
        at("subspace_filter", "layers.0.resid"): capacity(3),
        at("offset", "layers.0.resid"): capacity(1, "renorm"),
        at("gate", "layers.1.mlp.out", "layers.1.mlp.in"): capacity(2, "normalise"),
    }
    assert reserved_for([larger], EDITS) == made
    assert made.missing(Version(EDITS)) == made.missing(Version([larger])) == []


def test_ranks_of_edits_that_are_computed_together_add_up() -> None:
    """Two redirections, or two filters, at one site are one of the ranks of both; two normalising gates take turns."""
    where: Any = {"site": "layers.1.mlp.out", "reads": "layers.1.mlp.in"}
    gates = [Gate(**where, rank=1, part=part, normalise=part > 1) for part in (1, 2, 3)]
    filters = [SubspaceFilter(site="layers.0.resid", rank=rank, part=rank) for rank in (1, 2)]
    scales = [Scale(site="layers.0.q.out"), Scale(site="layers.0.q.out", part=2)]
    found = reserved_for([*gates, *filters, *scales])
    assert found.capacities == {
        at("subspace_filter", "layers.0.resid"): capacity(3, "dual"),
        at("scale", "layers.0.q.out"): capacity(1),
        at("gate", "layers.1.mlp.out", "layers.1.mlp.in"): capacity(1),
        at("gate", "layers.1.mlp.out", "layers.1.mlp.in", 1): capacity(1, "normalise"),
        at("gate", "layers.1.mlp.out", "layers.1.mlp.in", 2): capacity(1, "normalise"),
    }


def test_scopes_and_strengths_need_a_capacity_of_their_own() -> None:
    """Edits of other scopes take turns; with a strength every group is scaled; too many scopes are told by number."""
    late, early = Scope(segment="generated"), Scope(segment="prompt")
    offsets = [
        Offset(site="layers.0.resid", part=part, scope=scope) for part, scope in enumerate([late, late, early], 1)
    ]
    found = reserved_for(offsets)
    places_found = at("offset", "layers.0.resid"), at("offset", "layers.0.resid", index=1)
    assert found.capacities == dict.fromkeys(places_found, capacity(1, "scaled"))
    assert found.scopes == 2
    strong = Version(EDITS, Strength(minimum=0, maximum=1))
    assert all("scaled" in each.features for each in Reservation.for_versions([strong]).capacities.values())
    (reason,) = Reservation(found.capacities, 1).missing(Version(offsets))
    assert "Set edits.scopes to 2" in reason.message


def test_patterns_expand_over_the_sites_where_a_kind_has_a_meaning() -> None:
    """And over none that the architecture does not have."""
    assert reserve({"kind": "offset", "site": "layers.*.resid"}).sites() == [Site(layer, "resid") for layer in range(3)]
    everywhere = reserve({"kind": "offset", "site": "*"})
    assert everywhere.sites() == LLAMA.sites(WIDTHS.layers)
    overlapping = reserve(
        {"kind": "low_rank", "site": "layers.*.mlp.out", "rank": 2},
        {"kind": "low_rank", "site": "layers.1.mlp.out", "rank": 7},
        {"kind": "low_rank", "site": "layers.1.mlp.out", "reads": "mlp.out"},
    )
    ranks = {
        str(group.site): capacity.rank
        for group, capacity in overlapping.capacities.items()
        if group.reads.point == "mlp.h"
    }
    assert ranks == {"layers.0.mlp.out": 2, "layers.1.mlp.out": 7, "layers.2.mlp.out": 2}
    assert overlapping.capacities[at("low_rank", "layers.1.mlp.out")] == capacity(1)


@pytest.mark.parametrize(
    ("name", "site", "usual", "never"),
    [("LlamaForCausalLM", "layers.1.mlp.out", "layers.1.mlp.h", "attn.z"),
     ("Qwen3MoeForCausalLM", "layers.1.mlp.out", "layers.1.mlp.in", "mlp.h"),
     ("LlamaForCausalLM", "layers.1.q.out", "layers.1.attn.in", "mlp.in"),
     ("Qwen3ForCausalLM", "layers.1.q.out", "layers.1.q.out", "attn.in"),
     ("LlamaForCausalLM", "logits", "final", "logits")],
)  # fmt: skip
def test_a_reservation_reads_points_that_the_architecture_can_read(
    name: str, site: str, usual: str, never: str
) -> None:
    """Unless said otherwise its module's input; nothing inside experts, nor across a norm, where no edit could read."""
    item = Reserve(kind="low_rank", site=site)
    assert Reservation.from_settings([item], ARCHITECTURES[name], WIDTHS).capacities.keys() == {
        at("low_rank", site, usual)
    }
    with pytest.raises(SettingsError, match=f"reading {never} fits no site"):
        Reservation.from_settings([item.model_copy(update={"reads": never})], ARCHITECTURES[name], WIDTHS)


def test_patterns_that_fit_nothing_are_refused_all_at_once() -> None:
    """A misspelt site would otherwise be found out at the first promotion."""
    with pytest.raises(SettingsError) as refusal:
        reserve(
            {"kind": "scale", "site": "layers.*.resid"}, {"kind": "scale", "site": "layers.9.attn.z"},
            {"kind": "low_rank", "site": "*"}, {"kind": "low_rank", "site": "layers.*.mlp.out", "reads": "attn.z"},
        )  # fmt: skip
    assert "scale at 'layers.*.resid' fits no site; scale can stand at attn.in, q.out" in str(refusal.value)
    assert "scale at 'layers.9.attn.z' fits no site" in str(refusal.value)
    assert "low_rank at 'layers.*.mlp.out' reading attn.z fits no site" in str(refusal.value)
    assert "low_rank at '*'" not in str(refusal.value)


capacities = st.dictionaries(
    st.sampled_from(sorted({group for _, (edit, _) in every_edit(BASE) for group in edit_groups([edit])})),
    st.builds(Capacity, st.integers(1, 8), st.frozensets(st.sampled_from(["dual", "onto", "renorm", "normalise"]))),
)


reservations = st.builds(Reservation, capacities, st.integers(0, 4))


@cheaply
@given(reservations, reservations)
def test_the_union_of_two_reservations_is_the_smallest_that_holds_both(one: Reservation, other: Reservation) -> None:
    both = one | other
    assert both.capacities.keys() == one.capacities.keys() | other.capacities.keys()
    assert both.scopes == max(one.scopes, other.scopes)
    for group, found in both.capacities.items():
        parts = [each.capacities[group] for each in (one, other) if group in each.capacities]
        assert found.rank == max(part.rank for part in parts)
        assert found.features == frozenset().union(*(part.features for part in parts))
    assert both == other | one == both | one
    assert one | Reservation({}) == one


def test_a_union_changes_neither_of_its_parts() -> None:
    one, other = reserved_for(EDITS), reserved_for([Offset(site="final")])
    before = dict(one.capacities)
    assert len((one | other).capacities) == len(before) + 1
    assert one.capacities == before
    assert not one.missing(Version(EDITS))


@cheaply
@given(capacities)
def test_a_reservation_has_one_spelling_as_settings(wanted: dict[EditGroup, Capacity]) -> None:
    """What a server resolved is written into its config: it must read back as the same, in the same order."""
    made = Reservation(wanted)
    spelled = made.to_settings()
    assert reserve(*spelled) == made
    assert Reservation(dict(reversed(wanted.items()))).to_settings() == spelled
    assert json.loads(json.dumps(spelled)) == spelled


@cheaply
@given(capacities)
def test_a_version_fits_after_the_advice_in_its_refusal(wanted: dict[EditGroup, Capacity]) -> None:
    """Each reason names a setting to add; with all of them added nothing is missing any more."""
    have = Reservation(wanted)
    reasons = have.missing(Version(EDITS))
    assert {reason.code for reason in reasons} <= {"capacity"}
    advice = [json.loads(re.findall(r"Add (\{.*?\})", reason.message)[0]) for reason in reasons]
    assert reserve(*have.to_settings(), *advice).missing(Version(EDITS)) == []


def test_a_refusal_says_what_is_reserved() -> None:
    few = reserve({"kind": "low_rank", "site": "layers.1.mlp.out"}, {"kind": "offset", "site": "layers.0.resid"})
    messages = "\n".join(reason.message for reason in few.missing(Version(EDITS)))
    assert "low_rank of rank 2 at layers.1.mlp.out reading layers.1.mlp.h: rank 1 is reserved" in messages
    assert "offset of rank 1 at layers.0.resid with renorm: rank 1 is reserved" in messages
    assert "scale of rank 1 at layers.2.attn.z: nothing is reserved there" in messages


def test_a_whole_matrix_is_not_changed_served_per_request() -> None:
    delta = WeightDelta(site="layers.0.mlp.out", reads="layers.0.mlp.h")
    (reason,) = reserved_for([delta]).missing(Version([delta]))
    assert reason.code == "weights_mode"
    assert "install mode `weights`" in reason.message


def test_it_can_be_read_in_one_line() -> None:
    assert str(Reservation({})) == "nothing"
    assert str(reserved_for(EDITS)) == (
        "gate at 1 site(s) up to rank 2; low_rank at 1 site(s) up to rank 5; offset at 1 site(s) up to rank 1; "
        "scale at 1 site(s) up to rank 1; subspace_filter at 1 site(s) up to rank 3"
    )


def test_sites_come_once_in_model_order() -> None:
    """Slot tensors are made in this order on every worker, so their digests can be compared."""
    order = ["layers.0.resid", "layers.1.mlp.out", "layers.2.attn.z"]
    assert [str(site) for site in reserved_for(EDITS).sites()] == order
    assert [str(site) for site in reserved_for(EDITS[::-1]).sites()] == order


def test_several_ranks_are_those_of_one_edit() -> None:
    assert reserved_for(EDITS).several_ranks
    assert not reserved_for(
        [Scale(site="layers.2.attn.z"), LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=1)]
    ).several_ranks
