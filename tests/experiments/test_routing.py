"""Which way a request goes, for every state an experiment can be in; handles; and what a loop is. All pure."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.experiments import START, created, done
from vllm_edits.edit_store.errors import ArmRefused, NotFound, SettingsError
from vllm_edits.plugin.experiments.feedback_token import FeedbackTokens
from vllm_edits.plugin.experiments.repeats import loops
from vllm_edits.plugin.experiments.routing import Assignment, Route, decide
from vllm_edits.plugin.request import Request

HALVES = ({"name": "n", "start": 0, "end": 0.5}, {"name": "n", "start": 0.5, "end": 1})


def request(unit: str, arm: str = "", model: str = "polite") -> Request:
    return Request(model, headers={"x-edits-unit": unit, **({"x-edits-arm": arm} if arm else {})})


def serves(standings: Any, unit: str, **options: Any) -> str:
    return decide(standings, request(unit), START, **options).target


def test_only_what_runs_decides_and_only_about_its_model() -> None:
    draft = done({}, created())
    assert decide(draft, request("ann"), START) == Route("polite")
    running = done(draft, ("tone", "start"))
    assert decide(running, request("ann", model="other"), START) == Route("other")
    assert decide(running, request("ann"), START).assignment is not None
    assert decide(done(running, ("tone", "stop")), request("ann"), START) == Route("polite")


@given(unit=st.text(max_size=20))
def test_two_experiments_in_parts_of_a_namespace_share_out_the_units(unit: str) -> None:
    """Each unit is in exactly one; held out of both, it gets the control without an assignment."""
    both = done(
        {}, created(namespace=HALVES[0]), created(name="two", namespace=HALVES[1]), ("tone", "start"), ("two", "start")
    )
    route = decide(both, request(unit), START)
    assert route.assignment is not None
    lower = route.assignment.experiment == "tone"
    assert both["tone"].document.namespace.holds(unit) == lower  # type: ignore[union-attr]
    one = done({}, created(namespace=HALVES[0], holdout={"name": "h", "share": 1}), ("tone", "start"))
    held_out = decide(one, request(unit), START)
    assert (held_out.target, held_out.assignment) == ("base", None)


def test_what_this_server_cannot_serve_goes_to_the_control_and_an_asked_arm_is_refused() -> None:
    running = done({}, created(), ("tone", "start"))
    unit = next(str(number) for number in range(100) if serves(running, str(number)) == "polite")
    assert serves(running, unit, unavailable={("tone", "milder")}) == "base"
    with pytest.raises(ArmRefused, match="is not served here now"):
        decide(running, request(unit, "milder"), START, {("tone", "milder")})


@pytest.mark.parametrize("how", ["hash", "forced", "fallback"])
@given(unit=st.text(max_size=10))
def test_a_handle_says_what_it_was_made_of(how: Any, unit: str) -> None:
    """With and without what vLLM puts around it; one bit otherwise, and it says nothing."""
    standings = done({}, created(), ("tone", "start"))
    feedback_tokens = FeedbackTokens(b"k" * 32)
    shown = Assignment("tone", 1, "milder", how, request(unit).unit("x-edits-unit").hash, "header")
    made = feedback_tokens.make(shown, 1)
    assert len(made) == 40
    for text in (made, f"chatcmpl-{made}", f"cmpl-{made}-0", f"resp_{made}"):
        said = feedback_tokens.read(text, standings)
        assert (said.request, said.arm, said.unit, said.evidence) == (made, "milder", shown.unit, how == "hash")
    for place in (0, 8, 20, 39):
        other = made[:place] + ("A" if made[place] != "A" else "B") + made[place + 1 :]
        with pytest.raises(NotFound):
            feedback_tokens.read(other, standings)


def test_a_handle_of_a_phase_that_is_over_is_not_taken() -> None:
    first = done({}, created(), ("tone", "start"))
    feedback_tokens = FeedbackTokens(b"k" * 32)
    made = feedback_tokens.make(Assignment("tone", 1, "milder", "hash", "0" * 16, "user"), 1)
    assert feedback_tokens.read(made, first).phase == 1
    with pytest.raises(NotFound, match="to an earlier phase"):
        feedback_tokens.read(made, done(first, ("tone", "stop"), ("tone", "start")))


def test_a_key_file_that_cannot_be_one_is_refused(tmp_path: Any) -> None:
    (tmp_path / "short").write_text("abc")
    for file, said in ((tmp_path / "none", "cannot be read"), (tmp_path / "short", "expected at least 16 bytes")):
        with pytest.raises(SettingsError, match=said):
            FeedbackTokens.of(file)
    (tmp_path / "key").write_text("0123456789abcdef\n")
    one, two = FeedbackTokens.of(tmp_path / "key"), FeedbackTokens.of(tmp_path / "key")
    made = one.make(Assignment("tone", 1, "milder", "hash", "0" * 16, "user"), 1)
    assert two.read(made, done({}, created(), ("tone", "start"))).arm == "milder"
    with pytest.raises(NotFound):
        FeedbackTokens.of(None).read(made, done({}, created(), ("tone", "start")))


@given(passage=st.lists(st.integers(0, 9), min_size=1, max_size=32), before=st.lists(st.integers(10, 99), max_size=20))
def test_a_passage_over_and_over_is_a_loop(passage: list[int], before: list[int]) -> None:
    """Four times and 24 tokens; not when the last time is cut short before the fourth, nor with a token between."""
    times = max(4, -(-24 // len(passage)))
    assert loops([*before, *(passage * times)])
    assert not loops([*before, *(passage * times), 100])


def test_what_is_no_loop() -> None:
    """Short repetitions, text, nothing at all."""
    assert not loops([])
    assert not loops([1] * 23)
    assert loops([1] * 24)
    assert not loops(list(range(200)))
    assert not loops([1, 2, 3, 4, 5, 6, 7, 8] * 3)


def test_secrets_among_the_headers_are_not_kept() -> None:
    """A key is known by its hash."""
    sent = [(b"X-Api-Key", b"sk-1"), (b"x-edits-admin-token", b"t"), (b"X-Edits-Unit", b"ann")]
    found = Request.read("/v1/completions", sent, b"{}")
    assert found.headers == {"x-edits-unit": "ann"}
    assert "sk-1" not in repr(found)
    assert found.api_key_hash
