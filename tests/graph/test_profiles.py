"""The reservation profiles: their contents, and how they add up with entries and with what is promoted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.proofs.parity import every_edit, random_numbers
from tests.support.bundles import bundle_of
from tests.support.edited_models import SLOTS, TOKENS, by_formula, claim_on, install, run
from tests.support.fakes import BASE, WIDTHS, RequestStep, TinyModel, cheaply, edited_model, set_step
from tests.support.reserved import Version
from tests.support.toy_kind import store as toy
from vllm_edits.edit_store import KINDS, Gate, LowRank, Offset, Scale, Scope, Strength, SubspaceFilter
from vllm_edits.edit_store.architectures import ARCHITECTURES
from vllm_edits.edit_store.edits import MAX_RANK
from vllm_edits.edit_store.errors import SettingsError
from vllm_edits.edit_store.kinds import served_per_request
from vllm_edits.edit_store.sites import Site
from vllm_edits.plugin import plan as planning
from vllm_edits.plugin.graph.reservation import Capacity, EditGroup, Reservation, needs
from vllm_edits.plugin.graph.slot_bytes import slot_bytes
from vllm_edits.plugin.plan import Plan, Promoted, profile_rows
from vllm_edits.server_config.profiles import SCOPES, STANDARD, entries
from vllm_edits.server_config.settings import PROFILES, EditSettings, Profile, Reserve, read_settings

LATE, EARLY = Scope(segment="generated"), Scope(segment="prompt")
ENTRY = {"kind": "offset", "site": "final"}
FINAL = EditGroup(Site(None, "final"), "offset", Site(None, "final"))
GATE: dict[str, Any] = {"site": "layers.1.mlp.out", "reads": "layers.1.mlp.in"}


def reserved(
    reserve: Any, *versions: Sequence[Any], architecture: str = BASE.architecture, **settings: Any
) -> Reservation:
    """What a server would reserve while versions of these edits are promoted."""
    base = BASE.model_copy(update={"architecture": architecture})
    asked = read_settings({"edits": {"store": "/none", "reserve": reserve, **settings}})
    manifests: Any = [Version(edits) for edits in versions]
    return planning.reserve(asked, base, Promoted(manifests))


def holds(reservation: Reservation, *edits: Any, strength: Strength | None = None) -> bool:
    return reservation.missing(Version(edits, strength)) == []


# -- contents ----------------------------------------------------------------------------------------------------------


def test_every_entry_is_one_that_an_operator_may_write() -> None:
    """They are not validated when they are read, since a kind may be missing; here all are there."""
    assert [entry.reserve for entry in STANDARD] == [
        Reserve.model_validate(entry.reserve.model_dump()) for entry in STANDARD
    ]
    assert [Reserve.model_validate(each.model_dump()) for each in entries("all")] == entries("all")
    assert len({(each.reserve.kind, each.reserve.site, each.reserve.reads) for each in STANDARD}) == len(STANDARD)
    assert all(entry.methods for entry in STANDARD)
    assert list(SCOPES) == list(PROFILES)
    assert entries("promoted") == []


METHODS: dict[str, list[Any]] = {
    "ROCR, ROME": [LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=1)],
    "MEMIT, AlphaEdit": [LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=8)],
    "Ships, Sahara": [Scale(site="layers.0.attn.z"), Scale(site="layers.2.q.out")],
    "Model Surgery": [LowRank(site=f"layers.{n}.gate.out", reads=f"layers.{n}.mlp.in", rank=1) for n in range(3)],
    "stealth edits in place": [
        LowRank(site="layers.1.gate.out", reads="layers.1.mlp.in", rank=1),
        LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=1),
    ],
    "a jet-pack block": [Gate(**GATE, rank=1, normalise=True)],
    "abliteration": [SubspaceFilter(site=f"layers.{n}.resid", rank=1) for n in range(3)],
    "abliteration as heretic has it": [
        LowRank(site="layers.1.attn.out", reads="layers.1.attn.z", rank=3),
        LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=3),
    ],
    "LEACE": [SubspaceFilter(site="layers.1.resid", rank=4, oblique=True)],
    "LoReFT": [
        LowRank(site="layers.1.resid", reads="layers.1.resid", rank=4, scope=Scope(first=2, last=2)),
        Offset(site="layers.1.resid", scope=Scope(first=2, last=2)),
    ],
    "CAA": [Offset(site="layers.1.resid", scope=LATE)],
    "repeng": [Offset(site="layers.1.resid", renorm=True)],
    "ITI": [Offset(site="layers.1.attn.z", scope=LATE)],
    "LoFiT": [Offset(site=f"layers.{n}.attn.z") for n in range(3)],
}


@pytest.mark.parametrize("method", METHODS)
def test_the_standard_profile_holds_the_published_methods(method: str) -> None:
    """Negative control: what is promoted in an empty store holds none of them."""
    assert holds(reserved("standard"), *METHODS[method])
    assert not holds(reserved("promoted"), *METHODS[method])


@pytest.mark.parametrize(
    "edit",
    [
        LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=9),
        LowRank(site="layers.1.v.out", reads="layers.1.attn.in", rank=1),
        Scale(site="layers.1.mlp.h", per="channel"),
        SubspaceFilter(site="layers.1.resid", rank=1, onto=True),
        Gate(**GATE, rank=2),
    ],
)
def test_the_standard_profile_does_not_hold_everything(edit: Any) -> None:
    assert not holds(reserved("standard"), edit)


def test_the_profile_all_holds_every_form_of_every_edit_at_every_site() -> None:
    """Of ranks up to that of `standard`, with scopes and with a strength, in every architecture; and all of
    `standard`."""
    largest = max(entry.reserve.rank for entry in STANDARD)
    for architecture in ARCHITECTURES:
        base = BASE.model_copy(update={"architecture": architecture})
        everything, standard = (reserved(profile, architecture=architecture) for profile in ("all", "standard"))
        found = [edit for _, (edit, _) in every_edit(base) if edit.capacity <= largest]
        assert len(found) > 100
        missing = [edit for edit in found if not holds(everything, edit, strength=Strength(minimum=0, maximum=1))]
        assert missing == []
        assert everything | standard == everything
        assert {site.point for site in everything.sites()} == {
            site.point for site in ARCHITECTURES[architecture].sites(1)
        }
        assert everything.scopes >= standard.scopes
    assert not holds(
        everything, Offset(site="layers.1.resid", part=1), Offset(site="layers.1.resid", part=2, scope=LATE)
    )


@pytest.mark.parametrize(
    ("architecture", "left_out"),
    [
        ("LlamaForCausalLM", []),
        ("Qwen3ForCausalLM", []),
        ("Gemma2ForCausalLM", []),
        ("GPT2LMHeadModel", [("low_rank", "gate.out", "mlp.in")]),
        ("Qwen3MoeForCausalLM", [("low_rank", "gate.out", "mlp.in"), ("low_rank", "mlp.out", "mlp.h")]),
    ],
)
def test_an_entry_that_fits_no_site_of_a_model_is_left_out(architecture: str, left_out: list[Any]) -> None:
    """Without a word, for a profile is no explicit wish. The same entries written by an operator are refused."""
    made = reserved("standard", architecture=architecture)
    places = {(group.kind, group.site.point, group.reads.point) for group in made.capacities}
    every = {(group.kind, group.site.point, group.reads.point) for group in reserved("standard").capacities}
    assert sorted(every - places) == left_out
    assert places <= every
    assert len(made.capacities) == WIDTHS.layers * (len(STANDARD) - len(left_out)), "at every layer"
    written = [entry.reserve.model_dump() for entry in STANDARD]
    if left_out:
        with pytest.raises(SettingsError, match="fits no site") as refusal:
            reserved(written, architecture=architecture)
        assert len(str(refusal.value).splitlines()) == len(left_out)
    else:
        assert reserved(written, architecture=architecture, scopes=2) == made


def test_a_kind_that_is_not_registered_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with KINDS.temporarily():
        monkeypatch.setattr(KINDS, "_known", {name: kind for name, kind in KINDS.items() if name != "gate"})
        assert "gate" not in served_per_request()
        kinds = {profile: {group.kind for group in reserved(profile).capacities} for profile in ("standard", "all")}
        assert kinds["standard"] == kinds["all"] == {"scale", "low_rank", "subspace_filter", "offset"}
    assert "gate" in {group.kind for group in reserved("standard").capacities}, "positive control"


def test_a_kind_of_another_package_is_in_the_profile_all() -> None:
    """At each of its points, without a word about it in the profiles; `standard` names its kinds."""
    with KINDS.temporarily():
        toy.add()
        points = {group.site.point for group in reserved("all").capacities if group.kind == "clamp"}
        assert points == {site.point for site in ARCHITECTURES[BASE.architecture].sites(1)} - {"logits"}
        assert "clamp" not in {group.kind for group in reserved("standard").capacities}


@pytest.mark.parametrize("profile", ["standard", "all"])
def test_a_model_with_a_profile_serves_and_its_memory_is_foretold(profile: str) -> None:
    """A version by its formula beside the base model bit for bit."""
    reservation, model, plain = reserved(profile), TinyModel(), TinyModel()
    edits = [
        edit for method in ("ROCR, ROME", "Ships, Sahara", "a jet-pack block", "LoFiT") for edit in METHODS[method]
    ]
    bundle = bundle_of("polite", BASE, [(edit, random_numbers(edit, BASE, 1)) for edit in edits])
    edited = edited_model(model, reservation, slots=SLOTS)
    assert edited.bytes_reserved == Plan.of(reservation, slot_bytes(WIDTHS, torch.float32)).total(SLOTS)
    install(edited, 2, bundle)
    set_step(edited, [RequestStep(claim_on(edited, slot), 1) for slot in (2, 0) * (TOKENS // 2)])
    torch.manual_seed(1)
    inputs = torch.randn(TOKENS, WIDTHS.hidden)
    served, base = run(model, edited, inputs), plain.logits(plain(inputs))
    assert torch.equal(served[1::2], base[1::2])
    torch.testing.assert_close(served[::2], torch.from_numpy(by_formula(plain, inputs, bundle))[::2])
    assert (served - base)[::2].abs().max() > 0.01, "positive control"


def test_a_model_with_nothing_reserved_serves_the_base() -> None:
    model, plain, inputs = TinyModel(), TinyModel(), torch.randn(TOKENS, WIDTHS.hidden)
    edited = edited_model(model, reserved("promoted"), slots=SLOTS)
    set_step(edited, [RequestStep(None, TOKENS)])
    assert edited.bytes_reserved == 0
    assert torch.equal(run(model, edited, inputs), plain.logits(plain(inputs)))


# -- adding up ---------------------------------------------------------------------------------------------------------


def test_by_default_what_is_promoted_is_reserved() -> None:
    """And nothing for an empty store, without a warning."""
    edits = METHODS["LEACE"] + METHODS["CAA"]
    assert planning.reserve(EditSettings(store="/none"), BASE, Promoted([])) == Reservation({}, 0)
    assert reserved(None, edits) == reserved("promoted", edits) == Reservation.for_versions([Version(edits)])
    assert reserved("promoted", edits).scopes == 1


def test_profiles_entries_and_what_is_promoted_add_up() -> None:
    edits = [LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=30), Scale(site="layers.1.v.out")]
    needed, standard, entry = reserved("promoted", edits), reserved("standard"), reserved([ENTRY])
    assert list(entry.capacities) == [FINAL]
    assert not holds(standard, *edits)
    assert reserved("standard", edits) == reserved(["promoted", "standard"], edits) == standard | needed
    assert reserved(["promoted", ENTRY], edits) == needed | entry
    assert reserved(["standard", ENTRY, "standard"], edits) == standard | needed | entry
    assert reserved(["standard", "all"], edits) == reserved("all") | needed
    assert holds(reserved(["standard", ENTRY], edits), *edits, Offset(site="final"))


def test_entries_alone_are_the_whole_reservation() -> None:
    """And an empty list is none."""
    edits = METHODS["LEACE"]
    assert reserved([ENTRY], edits) == Reservation({FINAL: Capacity()})
    assert reserved([], edits) == Reservation({})
    assert not holds(reserved([ENTRY], edits), *edits)


def test_the_store_is_read_only_for_a_profile() -> None:
    """A server whose entries decide all starts while its store is away."""
    settings = EditSettings(store="/none/at/all", reserve=(Reserve(**ENTRY),))
    assert planning.reservations(settings, BASE) == (Reservation({FINAL: Capacity()}), {})
    with pytest.raises(Exception, match="no edit store at /none/at/all"):
        planning.reservations(settings.model_copy(update={"reserve": ("standard",)}), BASE)


@pytest.mark.parametrize("reserve", ["promoted", "standard", "all", ["standard", ENTRY], []])
def test_what_a_worker_writes_back_is_the_same_reservation(reserve: Any) -> None:
    """The loader puts it into the config as entries, which are read again without the store and without headroom."""
    made = reserved(reserve, METHODS["LEACE"], METHODS["CAA"], reserve_headroom=2)
    written = {"reserve": made.to_settings(), "scopes": made.scopes, "reserve_headroom": 2}
    settings = read_settings({"edits": {"store": "/none/at/all", **written}})
    assert planning.reservations(settings, BASE) == (made, {})


def test_an_entry_that_fits_no_site_is_refused_beside_a_profile_too() -> None:
    with pytest.raises(SettingsError, match=r"scale at 'layers\.\*\.resid' fits no site"):
        reserved(["standard", {"kind": "scale", "site": "layers.*.resid"}])


def test_scopes_are_those_of_the_profile_or_of_what_is_promoted_or_the_setting() -> None:
    three = [Offset(site="layers.0.resid", part=n, scope=Scope(first=n)) for n in (1, 2, 3)]
    two = [Offset(site="layers.0.resid", part=n, scope=scope) for n, scope in enumerate([LATE, EARLY], 1)]
    assert reserved("standard").scopes == SCOPES["standard"] == 2
    assert reserved("standard", three).scopes == 3
    assert reserved("promoted", two).scopes == 2
    assert reserved("all", three).scopes == SCOPES["all"] == 4
    assert reserved("standard", three, scopes=1).scopes == 1
    assert reserved([ENTRY], three).scopes == 0
    assert reserved([ENTRY], scopes=5).scopes == 5


edits_of_versions = st.lists(
    st.lists(
        st.sampled_from([edit for _, (edit, _) in every_edit(BASE)]), max_size=4, unique_by=lambda edit: edit.site
    ),
    max_size=3,
)


@cheaply
@given(edits_of_versions, st.sampled_from([["promoted"], ["standard"], ["all"], ["promoted", ENTRY]]), st.floats(1, 16))
def test_what_is_promoted_always_fits(versions: list[list[Any]], reserve: Any, headroom: float) -> None:
    made = reserved(reserve, *versions, reserve_headroom=headroom)
    assert all(holds(made, *edits) for edits in versions)


# -- headroom ----------------------------------------------------------------------------------------------------------


def rank_with(headroom: float, edit: Any, reserve: Any = "promoted") -> int:
    (group,) = needs(Version([edit]))
    return reserved(reserve, [edit], reserve_headroom=headroom).capacities[group].rank


@pytest.mark.parametrize(
    ("rank", "headroom", "expected"),
    [(2, 1, 2), (2, 1.5, 3), (3, 1.1, 4), (1, 1.01, 2), (2, 4, 8), (3, 16, 8), (8, 2, 8)],
)
def test_headroom_multiplies_ranks_up_to_the_width_of_the_vector(rank: int, headroom: float, expected: int) -> None:
    """Rounded up. 8 is the tiny model's width."""
    for edit in (
        LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=rank),
        SubspaceFilter(site="layers.1.resid", rank=rank),
        Gate(**GATE, rank=rank, normalise=True),
    ):
        assert rank_with(headroom, edit) == expected


def test_headroom_never_takes_away_and_ends_at_the_largest_rank() -> None:
    """A version may need a higher rank than its vectors are wide."""
    wide = WIDTHS.model_copy(update={"hidden": 4096})
    assert rank_with(2, LowRank(site="layers.1.resid", reads="layers.1.resid", rank=9)) == 9
    for rank, expected in ((10, 11), (300, 330), (500, MAX_RANK)):
        group = EditGroup(Site(1, "resid"), "low_rank", Site(1, "resid"))
        assert Reservation({group: Capacity(rank)}).with_headroom(1.1, wide).capacities == {group: Capacity(expected)}


def test_headroom_leaves_kinds_without_ranks_entries_and_profiles_as_they_are() -> None:
    unranked: list[Any] = [Scale(site="layers.1.attn.z"), Offset(site="layers.1.resid", renorm=True, scope=LATE)]
    assert reserved("promoted", unranked, reserve_headroom=16) == reserved("promoted", unranked)
    assert reserved("standard", reserve_headroom=16) == reserved("standard")
    entry = {"kind": "low_rank", "site": "layers.1.mlp.out", "rank": 2}
    assert reserved([entry], reserve_headroom=16) == reserved([entry])
    promoted = [LowRank(site="layers.1.attn.out", reads="layers.1.attn.z", rank=2)]
    assert reserved(["standard", entry], promoted, reserve_headroom=2.5) == (
        reserved("standard") | reserved([entry]) | reserved("promoted", promoted, reserve_headroom=2.5)
    )
    assert rank_with(2.5, promoted[0], "standard") == 5, "positive control: more than the profile's 3"


def test_a_version_that_grew_fits_into_headroom() -> None:
    one, two = (LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=rank) for rank in (2, 4))
    assert holds(reserved("promoted", [one], reserve_headroom=2), two)
    assert not holds(reserved("promoted", [one]), two)


# -- the table of `vllm-edits plan` ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reserve", "used"),
    [
        ("promoted", "promoted"),
        ("standard", "standard"),
        (["promoted", "all", ENTRY], "all"),
        ([ENTRY], None),
        ([], None),
    ],
)
def test_each_profile_is_told_with_its_memory_and_the_one_in_use(reserve: Any, used: Profile | None) -> None:
    """Entries do not change what the profiles take."""
    settings = read_settings({"edits": {"store": "/none", "reserve": reserve, "slots": 5}})
    version: Any = Version(METHODS["LEACE"])
    capacity_bytes = slot_bytes(WIDTHS, torch.bfloat16)
    told = profile_rows(settings, BASE, Promoted([version]), capacity_bytes)
    assert [row["profile"] for row in told] == list(PROFILES)
    assert [row["profile"] for row in told if row["in_use"]] == ([used] if used else [])
    for row in told:
        plan = Plan.of(reserved(row["profile"], version.edits), capacity_bytes)
        assert (row["bytes_per_slot"], row["bytes"]) == (plan.slot, plan.total(5))
    sizes = [row["bytes_per_slot"] for row in told]
    assert 0 < sizes[0] < sizes[1] < sizes[2]
