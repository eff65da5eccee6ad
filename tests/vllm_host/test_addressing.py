"""What the gate writes on a request: which slot it may use, and the salt of its prefix cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import cheaply
from vllm_edits.plugin.claim import CLAIM, FORK
from vllm_edits.plugin.serving.variants import Choice
from vllm_edits.plugin.version_info import VersionInfo
from vllm_edits.plugin.vllm_host.addressing import address, cache_salt
from vllm_edits.plugin.vllm_host.scheduler import fork_at_first_edit

versions = st.none() | st.text("0123456789abcdef", min_size=1, max_size=3)
salts = st.none() | st.text(max_size=4)


def of(version: str | None, strength: float = 1.0, **info: Any) -> Choice:
    """A choice of a version."""
    return Choice("polite", "polite", version, strength, VersionInfo(**info))


V1, V2 = of("1" * 64), of("2" * 64)


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
    same = cache_salt(of(version), salt) == cache_salt(of(other), other_salt)
    plain = (version, salt) == (None, None), (other, other_salt) == (None, None)
    assert same == ((version, salt or "", plain[0]) == (other, other_salt or "", plain[1]))


def test_parts_cannot_be_moved_across_the_border() -> None:
    parts = [("ab", "c"), ("a", "bc"), ("abc", ""), (None, "abc")]
    assert len({cache_salt(of(version), salt) for version, salt in parts}) == 4


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
    assert cache_salt(of("v"), "s") == "d36d17560ae06b6e133f4e35598b1c21961d85c0a41363f549a05c0711820dbe"


def test_strength_and_prompt_length_are_part_of_the_identity_where_they_matter() -> None:
    """Another strength is other keys and values. The prompt's length counts for versions that depend on it alone."""
    strengths = {cache_salt(of("v", strength), None) for strength in (1.0, 0.5, 0.25)}
    assert len(strengths) == 3
    assert cache_salt(of("v"), None, 10) == cache_salt(of("v"), None, 11)
    bound = of("v", bound_to_prompt=True)
    assert cache_salt(bound, None, 10) == cache_salt(bound, None, 10) != cache_salt(bound, None, 11)
    assert cache_salt(bound, None) != cache_salt(bound, None), "an unknown length shares with nobody"


def salted(prompt: Any, choice: Choice, *, forks: bool = False) -> Any:
    return address(prompt, Sampling(), choice, 1, forks=forks)[0]


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
    assert salted(mapping, of(None)) is mapping
    assert salted(mapping, V1) == {"prompt": "Hello", "cache_salt": cache_salt(V1, None)}
    assert mapping == {"prompt": "Hello"}
    unknown = object()
    assert salted(unknown, of(None)) is unknown


def test_a_prompt_that_cannot_carry_a_salt_is_refused_for_a_version() -> None:
    """Served without one, its blocks would be found by others."""
    with pytest.raises(TypeError, match="Send text or tokens"):
        salted(object(), V1)


def test_a_version_that_edits_only_the_end_shares_the_beginning_where_the_scheduler_forks() -> None:
    """It is salted as the base is, and says where it forks; where nobody forks it is salted as any version."""
    late, prompt = of("v", bound_to_prompt=True, tail=0), {"prompt_token_ids": [1, 2, 3], "cache_salt": "tenant"}
    forked, sampling = address(prompt, Sampling(), late, 4, forks=True)
    assert forked["cache_salt"] == cache_salt(None, "tenant")
    assert sampling.extra_args == {CLAIM: [4, "v", 1.0], FORK: [cache_salt(late, None, 3), 0]}
    whole, sampling = address(prompt, Sampling(), late, 4, forks=False)
    assert whole["cache_salt"] == cache_salt(late, "tenant", 3)
    assert sampling.extra_args == {CLAIM: [4, "v", 1.0]}
    assert FORK not in address(prompt, Sampling(), V1, 4, forks=True)[1].extra_args


@pytest.mark.parametrize("forged", [None, {}, {CLAIM: [3, "2" * 64]}, {CLAIM: [3, "2" * 64], FORK: ["x", 0], "own": 1}])
def test_whatever_a_caller_claims_is_overwritten(forged: dict[str, Any] | None) -> None:
    """The claim is the gate's alone; a caller's other arguments, and the caller's own object, stay as they were."""
    sampling = Sampling(forged)
    theirs = {key: value for key, value in (forged or {}).items() if key == "own"}
    assert address("x", sampling, V1, 1, forks=False)[1].extra_args == {**theirs, CLAIM: [1, V1.version, 1.0]}
    assert address("x", sampling, of(None), 0, forks=False)[1].extra_args == (theirs or None)
    assert sampling == Sampling(forged)


# -- the cache's hashes ------------------------------------------------------------------------------------------------


class Request:
    """A request as vLLM's block hashing sees it: hashes of full blocks, each chained to the one before."""

    BLOCK = 4

    def __init__(self, tokens: list[int], arguments: dict[str, Any] | None) -> None:
        self.sampling_params = Sampling(arguments)
        self.num_prompt_tokens = len(tokens)
        self.tokens, self.block_hashes = list(tokens), list[bytes]()
        self._block_hasher: Any = Request._hash
        self.update_block_hashes()

    @staticmethod
    def _hash(request: Request) -> list[bytes]:
        new: list[bytes] = []
        while (end := (len(request.block_hashes) + len(new) + 1) * Request.BLOCK) <= len(request.tokens):
            parent = new[-1] if new else request.block_hashes[-1] if request.block_hashes else b""
            new.append(hashlib.sha256(parent + bytes(request.tokens[end - Request.BLOCK : end])).digest())
        return new

    def update_block_hashes(self) -> None:
        self.block_hashes.extend(self._block_hasher(self))

    def go_on(self, *tokens: int) -> Request:
        for token in tokens:
            self.tokens.append(token)
            self.update_block_hashes()
        return self


def forked(tokens: list[int], salt: str, tail: int = 0) -> Request:
    request = Request(tokens, {FORK: [salt, tail]})
    fork_at_first_edit(request, Request.BLOCK)
    return request


@cheaply
@given(st.lists(st.integers(0, 255), max_size=30), st.lists(st.integers(0, 255), max_size=30), st.integers(0, 9))
def test_blocks_are_the_bases_up_to_the_first_edited_token_and_never_after(
    prompt: list[int], answer: list[int], tail: int
) -> None:
    """However the tokens arrive, one salt gives the same hashes; another salt, or the base, share no later block."""
    mine = forked(prompt, "mine", tail).go_on(*answer)
    at_once, other = forked(prompt, "mine", tail), forked(prompt, "other", tail).go_on(*answer)
    at_once.tokens += answer
    at_once.update_block_hashes()
    base = Request(prompt, None).go_on(*answer)
    first = max(0, len(prompt) - tail) // Request.BLOCK
    assert mine.block_hashes == at_once.block_hashes
    assert len(mine.block_hashes) == len(base.block_hashes)
    assert mine.block_hashes[:first] == base.block_hashes[:first] == other.block_hashes[:first]
    assert not set(mine.block_hashes[first:]) & {*base.block_hashes, *other.block_hashes}


def test_a_request_that_does_not_fork_is_left_alone() -> None:
    request = Request(list(range(9)), {"own": 1})
    before = list(request.block_hashes), request._block_hasher
    fork_at_first_edit(request, Request.BLOCK)
    assert (request.block_hashes, request._block_hasher) == before
