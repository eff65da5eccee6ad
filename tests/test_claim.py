"""What the gate writes on a request: which slot it may use, and the salt of its prefix cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugin.claim import CLAIM, cache_salt
from plugin.engine_gate import claimed, salted
from tests.fakes import cheaply

versions = st.none() | st.text("0123456789abcdef", min_size=1, max_size=3)
salts = st.none() | st.text(max_size=4)
V1, V2 = "1" * 64, "2" * 64


@dataclass
class Sampling:
    """Sampling parameters as far as the gate reads them."""

    extra_args: dict[str, Any] | None = None

    def clone(self) -> Sampling:
        return replace(self)


@cheaply
@given(versions, salts, versions, salts)
def test_two_pairs_share_a_salt_only_if_they_are_equal(version: Any, salt: Any, other: Any, other_salt: Any) -> None:
    """No version and caller's salt can be written so that they read as another pair; no salt is an empty one."""
    same = cache_salt(version, salt) == cache_salt(other, other_salt)
    plain = (version, salt) == (None, None), (other, other_salt) == (None, None)
    assert same == ((version, salt or "", plain[0]) == (other, other_salt or "", plain[1]))


def test_parts_cannot_be_moved_across_the_border() -> None:
    assert len({cache_salt("ab", "c"), cache_salt("a", "bc"), cache_salt("abc", ""), cache_salt(None, "abc")}) == 4


def test_the_base_without_a_salt_has_none() -> None:
    """So it shares its cache as if the plugin were not there; with a salt of the caller's it stays apart."""
    assert cache_salt(None, None) is None
    assert cache_salt(None, "mine") not in (None, "mine")


def test_a_caller_cannot_write_the_salt_of_a_version() -> None:
    """Knowing another's salt (it is no secret) leads to a third one, as base or as any version."""
    stolen = cache_salt(V1, "tenant")
    assert len({stolen, cache_salt(None, stolen), cache_salt(V1, stolen), cache_salt(V2, stolen)}) == 4


def test_every_process_computes_the_same_salt() -> None:
    """Replicas that share a cache must agree: no process-wide seed is in it. (Expected value by sha256sum.)"""
    assert cache_salt("v", "s") == "be8c5d2e1c307f67a62a3d3c467fe970b18edb60675efc6f590f115c2229e9ab"


@pytest.mark.parametrize(
    "prompt", ["Hello", [1, 2, 3], {"prompt": "Hello"}, {"prompt_token_ids": [1], "cache_salt": "mine"}]
)
def test_every_form_of_prompt_is_kept_apart_by_version(prompt: Any) -> None:
    found = [salted(prompt, version) for version in (V1, V2)]
    assert all(isinstance(each, dict) and each["cache_salt"] for each in found)
    assert found[0]["cache_salt"] != found[1]["cache_salt"]
    own = prompt.get("cache_salt") if isinstance(prompt, dict) else None
    assert found[0]["cache_salt"] == cache_salt(V1, own)


def test_a_base_prompt_without_a_salt_is_left_alone_and_nothing_is_written_into_the_callers() -> None:
    mapping = {"prompt": "Hello"}
    assert salted(mapping, None) is mapping
    assert salted(mapping, V1) == {"prompt": "Hello", "cache_salt": cache_salt(V1, None)}
    assert mapping == {"prompt": "Hello"}
    unknown = object()
    assert salted(unknown, None) is unknown


def test_a_prompt_that_cannot_carry_a_salt_is_refused_for_a_version() -> None:
    """Served without one, its blocks would be found by others."""
    with pytest.raises(TypeError, match="send text or tokens"):
        salted(object(), V1)


@pytest.mark.parametrize("forged", [None, {}, {CLAIM: [3, V2]}, {CLAIM: [3, V2], "theirs": 1}])
def test_whatever_a_caller_claims_is_overwritten(forged: dict[str, Any] | None) -> None:
    """The claim is the gate's alone; a caller's other arguments, and the caller's own object, stay as they were."""
    sampling = Sampling(forged)
    theirs = {key: value for key, value in (forged or {}).items() if key != CLAIM}
    assert claimed(sampling, [1, V1]).extra_args == {**theirs, CLAIM: [1, V1]}
    assert claimed(sampling, None).extra_args == (theirs or None)
    assert sampling == Sampling(forged)
