"""What the names in a request's `model` field mean."""

from __future__ import annotations

import dataclasses

import pytest

from vllm_edits.edit_store.errors import NotFound
from vllm_edits.edit_store.refs import Ref
from vllm_edits.plugin.serving.variants import Choice, VariantTable, VersionWanted

V1, V2, V3 = "1" * 64, "2" * 64, "3" * 64
TABLE = VariantTable(
    base_names=("SmolLM2", "smol"),
    default_tag="prod",
    promoted={"careful": {"prod": V1, "beta": V2}, "strict": {"prod": V3}, "draft": {"beta": V2}},
)


@pytest.mark.parametrize(
    ("model", "choice"),
    [
        ("SmolLM2", Choice("SmolLM2", "base", None)),
        ("smol", Choice("smol", "base", None)),
        ("", Choice("SmolLM2", "base", None)),
        ("careful", Choice("careful", "careful", V1)),
        ("careful@prod", Choice("careful@prod", "careful", V1)),
        ("careful@beta", Choice("careful@beta", "careful", V2)),
        ("draft@beta", Choice("draft@beta", "draft", V2)),
    ],
)
def test_names_mean_the_base_or_what_their_tag_promotes(model: str, choice: Choice) -> None:
    assert TABLE.resolve(model) == choice


def test_a_version_is_for_the_store_to_look_up() -> None:
    """Digits of a digest are no tag: which version they are is not known here."""
    assert TABLE.resolve("careful@abcdef") == VersionWanted(Ref("careful", "abcdef"))
    assert TABLE.resolve(f"strict@{V3}") == VersionWanted(Ref("strict", V3))


@pytest.mark.parametrize(
    ("model", "nearest"),
    [
        ("carefull", "Did you mean 'careful'"),
        ("careful@bta", "Did you mean 'careful@beta'"),
        ("draft", "Did you mean 'draft@beta'"),
        ("SMOLLM2", ""),
        ("careful@abc", ""),  # too short for a version, and no tag
        ("nothing@abcdef", ""),
        ("../../etc/passwd", ""),
        ("careful@", "careful"),
        ("@prod", ""),
        ("careful@prod@prod", ""),
        ("x" * 10_000, ""),
        ("смол", ""),
    ],
)
def test_an_unknown_name_is_refused_with_what_is_served(model: str, nearest: str) -> None:
    """Never the base model in silence."""
    with pytest.raises(NotFound) as refusal:
        TABLE.resolve(model)
    served = "Served: SmolLM2, smol, careful@beta, careful, draft@beta, strict."
    assert served in str(refusal.value)
    assert nearest in str(refusal.value)


def test_every_listed_name_resolves_to_its_own_version() -> None:
    """What `/v1/models` shows can be sent back, whatever the default tag is."""
    for table in (TABLE, dataclasses.replace(TABLE, default_tag="beta")):
        for name in table.names():
            variant, _, tag = name.partition("@")
            assert table.resolve(name) == Choice(name, variant, TABLE.promoted[variant][tag or table.default_tag])
        assert table.versions() == {V1, V2, V3}


def test_a_table_without_variants_serves_the_base_alone() -> None:
    empty = VariantTable(("smol",), "prod")
    assert empty.names() == []
    assert empty.resolve("smol").version is None  # type: ignore[union-attr]
    with pytest.raises(NotFound, match=r"Served: smol\."):
        empty.resolve("careful")


def test_a_table_cannot_be_changed_in_place() -> None:
    """A swap makes a new one, so a request never sees half a swap."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        TABLE.default_tag = "beta"  # type: ignore[misc]
