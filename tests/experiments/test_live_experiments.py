"""Experiments over HTTP: who gets which arm, what is written down, what clients say of it, and what ends an arm."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.bundles import whose_gates_fire
from tests.support.fakes import Server, version_of
from tests.support.site import Call, Site, another_process, until
from vllm_edits.edit_store import Bundle, Gate, Offset
from vllm_edits.edit_store.errors import SettingsError
from vllm_edits.edit_store.experiments.assignment import bucket, chosen
from vllm_edits.edit_store.experiments.document import Experiment
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange
from vllm_edits.edit_store.storage.log import Log
from vllm_edits.plugin.claim import CLAIM
from vllm_edits.plugin.experiments.analysis.evidence import Logs, collect
from vllm_edits.plugin.experiments.exposure_log import ExposureLog
from vllm_edits.plugin.experiments.feedback_token import FeedbackTokens
from vllm_edits.plugin.experiments.records import Exposure, FeedbackRecord, Record, Said, ShadowRecord
from vllm_edits.plugin.experiments.resolver import Resolver
from vllm_edits.plugin.http.middleware import _with_id
from vllm_edits.plugin.request import Request

pytestmark = pytest.mark.anyio
UNITS = [f"user-{number}" for number in range(60)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Trial(Site):
    """A site with one experiment: the base against a version that only the experiment names."""

    def __init__(self, server: Server, folder: Path, owner: Any = None) -> None:
        super().__init__(server, None, owner)
        self.folder = folder
        self.log = Experiments(server.store)
        self.promoted = ""
        self.treatment = ""

    async def begin(self, *, serves: str = "base", treatment: Bundle | None = None, **fields: Any) -> None:
        """Publish, promote one version, and start."""
        (self.promoted,) = await self.server.promote(version_of("polite"))
        self.treatment = self.server.store.publish(treatment or version_of("polite"))
        arms = [{"name": "control", "serves": serves, "weight": 0.5},
                {"name": "milder", "serves": f"polite@{self.treatment}", "weight": 0.5}]  # fmt: skip
        self.log.create(Experiment.parse({"name": "tone", "model": "polite", "arms": arms, **fields}))
        await self.do("start")

    async def do(self, operation: Any, **fields: Any) -> None:
        self.log.change(ExperimentChange(experiment="tone", operation=operation, **fields))
        await self.server.sync()

    async def say(
        self, unit: str | None = None, headers: Mapping[str, str] | None = None, **body: Any
    ) -> httpx.Response:
        """One request for `polite`."""
        told = {**({"x-edits-unit": unit} if unit else {}), **(headers or {})}
        answer = await self.client.post("/v1/completions", json={"model": "polite", **body}, headers=told)
        await self.server.core.slots.wait_drained()
        return answer

    def arm(self, unit: str, coverage: float = 1.0, phase: int = 1) -> int | None:
        return chosen((0.5, 0.5), coverage, bucket(f"tone/{phase}", unit))

    def records(self) -> list[Record]:
        return list(Logs([self.folder]))

    def exposures(self) -> list[Exposure]:
        return [record for record in self.records() if isinstance(record, Exposure)]


@pytest.fixture(params=["its own process", "another process"])
async def trial(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Trial]:
    """The slots' owner is in this process or in another."""
    folder = tmp_path / "exposures"
    server = Server(
        f"memory://{tmp_path}", exposures=ExposureLog(folder, 1 << 20), feedback_tokens=FeedbackTokens(b"k" * 32)
    )
    async with AsyncExitStack() as processes:
        owner = None
        if request.param == "another process":
            owner = await processes.enter_async_context(another_process(server, tmp_path / "owner.sock"))
        made = Trial(server, folder, owner)
        yield made
        await made.client.aclose()
        while not made.is_quiet():  # noqa: ASYNC110  what is given back over a socket arrives a little later
            await asyncio.sleep(0.001)


def _asking(unit: str) -> Request:
    return Request("polite", headers={"x-edits-unit": unit})


def version(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-edits-version"]


async def test_every_unit_gets_its_arm_every_time(trial: Trial) -> None:
    """By the hash, whichever way it says who it is; what is answered was computed with that arm's edits."""
    await trial.begin()
    serves = {0: "base", 1: trial.treatment}
    for unit in UNITS:
        answers = [await trial.say(unit), await trial.say(user=unit), await trial.say(unit, stream=True)]
        assert {version(answer) for answer in answers} == {serves[trial.arm(unit)]}  # type: ignore[index]
    claimed = Counter(trial.engine.claims)
    assert set(claimed) == {None, trial.treatment}
    assert claimed[None] == 3 * sum(trial.arm(unit) == 0 for unit in UNITS)


async def test_what_is_written_down_is_one_line_a_request_and_no_text(trial: Trial) -> None:
    await trial.begin()
    for unit in UNITS:
        await trial.say(unit, prompt="a secret", max_tokens=5)
    await trial.say(prompt="a secret")
    await asyncio.sleep(0.05)
    shown = trial.exposures()
    assert len(shown) == len(UNITS) + 1
    assert "secret" not in "".join(path.read_text() for path in trial.folder.iterdir())
    assert not any(unit in path.read_text() for path in trial.folder.iterdir() for unit in UNITS)
    first = shown[0]
    assert (first.experiment, first.phase, first.chosen, first.source, first.outcome) == (
        "tone",
        1,
        "hash",
        "header",
        "ok",
    )
    assert (first.prompt_tokens, first.output_tokens, first.empty) == (4, 5, False)
    assert first.first_token_seconds is not None
    assert shown[-1].source == "request"
    by_arm = Counter(exposure.arm for exposure in shown[:-1])
    assert by_arm == Counter(["control", "milder"][trial.arm(unit) or 0] for unit in UNITS)
    evidence = collect(trial.records(), "tone", 1)
    assert sum(evidence.units.values()) == len(UNITS) + 1
    told = sum(
        trial.server.metric("arm_requests_total", experiment="tone", arm=arm, outcome="ok")
        for arm in ("control", "milder")
    )
    assert told == len(shown)


async def test_the_order_in_which_a_unit_is_looked_for(trial: Trial) -> None:
    """Its header, then the user, then the API key, then the request by itself."""
    await trial.begin()
    key = {"authorization": "Bearer sk-1"}
    for _ in range(2):
        await trial.say("ann", key, user="bob")
        await trial.say(None, key, user="bob")
        await trial.say(None, key)
        await trial.say()
    await asyncio.sleep(0.05)
    shown = trial.exposures()
    assert [exposure.source for exposure in shown] == ["header", "user", "key", "request"] * 2
    assert [one.unit == two.unit for one, two in zip(shown[:4], shown[4:], strict=True)] == [True, True, True, False]


async def test_who_says_what_it_wants_gets_that(trial: Trial) -> None:
    """A version, and an arm by its name; neither is evidence. An arm that is not there is an error."""
    await trial.begin()
    treated = next(unit for unit in UNITS if trial.arm(unit) == 1)
    asked = await trial.ask(f"polite@{trial.promoted[:12]}")
    assert version(asked) == trial.promoted
    assert "x-edits-experiment" not in asked.headers
    forced = await trial.say(treated, {"x-edits-arm": "control"})
    assert (version(forced), forced.headers["x-edits-experiment"]) == ("base", "tone/control")
    wrong = await trial.say(treated, {"x-edits-arm": "ruder"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-edits-arm")
    assert "Arms for the model 'polite': control, milder" in wrong.json()["error"]["message"]
    none = await trial.client.post("/v1/completions", json={"model": "tiny"}, headers={"x-edits-arm": "control"})
    assert "none, because no experiment runs" in none.json()["error"]["message"]
    await trial.do("withdraw", arm="milder")
    assert "is not served here now" in (await trial.say(None, {"x-edits-arm": "milder"})).json()["error"]["message"]
    await asyncio.sleep(0.05)
    assert [exposure.chosen for exposure in trial.exposures()] == ["forced"]


async def test_who_takes_no_part_gets_the_control_and_is_not_written_down(trial: Trial) -> None:
    """Not covered; held out of the namespace's part; and a wider coverage brings some in, and moves nobody."""
    await trial.begin(coverage=0.2)
    before = {unit: version(await trial.say(unit)) for unit in UNITS}
    assert {unit for unit in UNITS if before[unit] == trial.treatment} == {u for u in UNITS if trial.arm(u, 0.2) == 1}
    await trial.do("widen", coverage=1.0)
    after = {unit: version(await trial.say(unit)) for unit in UNITS}
    assert all(after[unit] == trial.treatment for unit in UNITS if before[unit] == trial.treatment)
    assert sum(found == trial.treatment for found in after.values()) == sum(trial.arm(unit) == 1 for unit in UNITS)
    await asyncio.sleep(0.05)
    part = sum(trial.arm(unit, 0.2) is not None for unit in UNITS)
    assert len(trial.exposures()) == part + len(UNITS)


async def test_a_withdrawn_arm_is_served_by_the_control(trial: Trial) -> None:
    """Marked, so that it is no evidence; the others stay where they are. Stopped, the name means what it meant."""
    await trial.begin()
    treated = next(unit for unit in UNITS if trial.arm(unit) == 1)
    assert version(await trial.say(treated)) == trial.treatment
    await trial.do("withdraw", arm="milder")
    assert version(await trial.say(treated)) == "base"
    await asyncio.sleep(0.05)
    assert [exposure.chosen for exposure in trial.exposures()] == ["hash", "fallback"]
    await trial.do("stop")
    assert version(await trial.say(treated)) == trial.promoted


async def test_an_arm_that_this_server_cannot_hold_is_served_by_the_control(trial: Trial) -> None:
    """Such edits are not reserved. The reason is told, and no request fails."""
    await trial.begin()
    big = trial.server.store.publish(version_of("polite", edit=Offset(site="layers.0.resid")))
    await trial.do("stop")
    arms = [
        {"name": "control", "serves": "base", "weight": 0.5},
        {"name": "milder", "serves": f"polite@{big}", "weight": 0.5},
    ]
    trial.log.create(Experiment.parse({"name": "tone", "model": "polite", "arms": arms}))
    await trial.do("start")
    assert {version(await trial.say(unit)) for unit in UNITS} == {"base"}
    (told,) = (await trial.client.get("/v1/edits/experiments")).json()
    assert "reserve" in told["arms"][1]["by_control"]


async def test_an_arm_follows_the_tag_that_it_names(trial: Trial) -> None:
    """And when the tag is withdrawn, the control answers."""
    await trial.begin()
    await trial.do("stop")
    arms = [
        {"name": "control", "serves": "base", "weight": 0.5},
        {"name": "milder", "serves": "polite@prod", "weight": 0.5},
    ]
    trial.log.create(Experiment.parse({"name": "tone", "model": "tone-test", "arms": arms}))
    await trial.do("start")
    treated = next(unit for unit in UNITS if trial.arm(unit, phase=2) == 1)

    async def ask() -> httpx.Response:
        answer = await trial.client.post("/v1/completions", json={"model": "tone-test", "user": treated})
        await trial.server.core.slots.wait_drained()
        return answer

    assert version(await ask()) == trial.promoted
    (newer,) = await trial.server.promote(version_of("polite"))
    answer = await ask()
    assert (version(answer), answer.json()["model"]) == (newer, "tone-test")
    assert "tone-test" in [card["id"] for card in (await trial.client.get("/v1/models")).json()]
    trial.server.store.withdraw("polite")
    await trial.server.sync()
    assert version(await ask()) == "base"


async def test_feedback_is_joined_to_the_arm_and_counts_once(trial: Trial) -> None:
    """By the header, or by the id of vLLM's answer; the same again is harmless, something else is refused."""
    await trial.begin(feedback=[{"name": "thumbs"}])
    answer = await trial.say("ann")
    feedback_token = answer.headers["x-edits-request"]

    async def tell(request: str, metric: str = "thumbs", value: float = 1.0) -> httpx.Response:
        told = {"request_id": request, "metric": metric, "value": value}
        return await trial.client.post("/v1/edits/feedback", json=told)

    for same in (feedback_token, f"chatcmpl-{feedback_token}", f"cmpl-{feedback_token}-0"):
        said = await tell(same)
        assert (said.status_code, said.json()["counted"]) == (200, True)
    changed = feedback_token[:-1] + ("A" if feedback_token[-1] != "A" else "B")
    for request, metric, value, status, words in [
        (feedback_token, "thumbs", 0.0, 422, "has the value 1 for 'thumbs' already. The first value counts"),
        (feedback_token, "thumbs", 7.0, 422, "from 0 to 1, found 7"),
        (feedback_token, "stars", 1.0, 422, "has no feedback metric 'stars'. Its metrics: thumbs"),
        ("cmpl-123", "thumbs", 1.0, 404, "expected the `id` of an answer"),
        (changed, "thumbs", 1.0, 404, "no request of an experiment"),
        (FeedbackTokens(b"x" * 32).make(trial.server.core.experiments.route(_asking("ann")).assignment, 0),
         "thumbs", 1.0, 404, "no request of an experiment"),
    ]:  # fmt: skip
        refused = await tell(request, metric, value)
        assert (refused.status_code, words in refused.json()["detail"]) == (status, True), refused.text
    forced = await trial.say("ann", {"x-edits-arm": "milder"})
    assert (await tell(forced.headers["x-edits-request"])).json()["counted"] is False
    (feedback,) = [record for record in trial.records() if isinstance(record, FeedbackRecord)]
    arm = ["control", "milder"][trial.arm("ann") or 0]
    assert (feedback.arm, feedback.value) == (arm, 1.0)
    assert trial.server.metric("feedback_count", experiment="tone", arm=arm, metric="thumbs") == 1


async def test_vllm_is_given_the_handle_as_id_where_there_is_none() -> None:
    """So the `id` of an answer is good for feedback; a client's own id is left alone."""
    own = {"headers": [(b"x-request-id", b"mine")]}
    assert _with_id(own, "handle") is own
    assert _with_id({"headers": []}, "handle")["headers"] == [(b"x-request-id", b"handle")]
    assert _with_id({"headers": []}, "")["headers"] == []


async def test_a_guardrail_withdraws_an_arm_here_at_once_and_everywhere_by_an_entry(trial: Trial) -> None:
    """Errors of the treatment alone; afterwards no request fails, and the reason is in the store."""
    await trial.begin(guardrails=[{"metric": "error", "maximum": 0.1, "interval": 0.01, "minimum_requests": 5}])
    treated = [unit for unit in UNITS if trial.arm(unit) == 1]
    for unit in treated[:10]:
        await trial.say(unit, prompt="crash")
    await asyncio.sleep(0.05)
    await trial.server.core.experiments.measure()
    assert trial.server.metric("experiment_rollbacks_total", experiment="tone", arm="milder", metric="error") == 1
    assert {version(await trial.say(unit)) for unit in treated} == {"base"}, "before any look at the store"
    standing = trial.log.standings()[0]["tone"]
    assert standing.withdrawn == {"milder"}
    assert "error was 1 over 10 requests" in standing.reason
    assert trial.log.history()[-1].actor.startswith("guardrail:")
    other = Server(trial.server.store.url)
    await other.sync()
    lease = await other.lease("polite", headers={"x-edits-unit": treated[0]})
    with lease.hold():
        assert lease.choice.version is None


async def test_a_version_that_only_an_arm_names_is_served_by_its_name_and_until_the_end(trial: Trial) -> None:
    """Its digest under another name is nothing that is served, nor is it after the experiment."""
    await trial.begin()
    alone = trial.server.store.publish(version_of("only-published"))
    arms = [{"name": name, "serves": serves, "weight": 0.5}
            for name, serves in (("control", "base"), ("alone", f"only-published@{alone}"))]  # fmt: skip
    trial.log.create(Experiment.parse({"name": "lone", "model": "lonely", "arms": arms}))
    trial.log.change(ExperimentChange(experiment="lone", operation="start"))
    await trial.server.sync()
    assert version(await trial.ask(f"only-published@{alone}")) == alone
    for name in ("lonely", "nobody"):
        assert (await trial.ask(f"{name}@{alone}")).status_code == 404
    trial.log.change(ExperimentChange(experiment="lone", operation="stop"))
    await trial.server.sync()
    assert (await trial.ask(f"only-published@{alone}")).status_code == 404


@pytest.mark.parametrize("limit", [{"maximum": 0.2}, {"maximum_authored_ratio": 2}])
async def test_an_arm_whose_gates_fire_too_often_is_withdrawn(trial: Trial, limit: dict[str, float]) -> None:
    """For two tokens of nine, where one of five is allowed, by the rule or as twice what the author of the version
    measured."""
    gate = Gate(site="layers.1.resid", reads="layers.1.resid", rank=1)
    rule = {"metric": "gate_firings", "interval": 0.01, "minimum_requests": 5, **limit}
    await trial.begin(guardrails=[rule], treatment=whose_gates_fire(version_of("polite", edit=gate), 0.1))
    treated = [unit for unit in UNITS if trial.arm(unit) == 1][:10]
    experiments = trial.server.core.experiments
    for times, withdrawn in ((10, frozenset[str]()), (20, {"milder"})):
        for unit in treated:
            assert version(await trial.say(unit, max_tokens=5)) == trial.treatment
        await asyncio.sleep(0.05)
        experiments.fired("a version of no arm", 1000, 1000)
        experiments.fired(trial.treatment, times, 90)
        await experiments.measure()
        assert trial.log.standings()[0]["tone"].withdrawn == withdrawn


async def test_an_arm_without_gates_has_none_that_fire(trial: Trial) -> None:
    """Its tokens are evidence of that, and not missing."""
    await trial.begin(guardrails=[{"metric": "gate_firings", "interval": 0.01, "minimum_requests": 5, "maximum": 0.2}])
    for unit in [unit for unit in UNITS if trial.arm(unit) == 1][:10]:
        await trial.say(unit)
    await asyncio.sleep(0.05)
    await trial.server.core.experiments.measure()
    ((state,),) = [row["guardrails"] for row in trial.server.core.experiments.status()]
    assert (state["last"]["result"], state["last"]["mean"]) == ("successful", 0)


async def test_an_entry_about_something_else_is_no_reason_to_be_silent(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody writes to the log between a server's reading and its writing: it decides again, and writes."""
    await trial.begin(guardrails=[{"metric": "error", "maximum": 0.1, "interval": 0.01, "minimum_requests": 5}])
    for unit in [unit for unit in UNITS if trial.arm(unit) == 1][:10]:
        await trial.say(unit, prompt="crash")
    await asyncio.sleep(0.05)
    other = Experiment.parse(
        {"name": "other", "model": "x", "arms": [{"name": n, "serves": "base", "weight": 0.5} for n in "ab"]}
    )
    history, overtaken = Log.history, iter([True])

    def overtake(log: Any) -> Any:
        found = history(log)
        if next(overtaken, False):
            Experiments(trial.server.store).create(other)
        return found

    monkeypatch.setattr(Log, "history", overtake)
    await trial.server.core.experiments.measure()
    assert [entry.operation for entry in trial.log.history()] == ["create", "start", "create", "withdraw"]


async def test_a_withdrawal_of_a_phase_that_is_over_is_not_of_the_next(trial: Trial) -> None:
    """The store was away when the arm broke its rule; meanwhile a person began anew."""
    await trial.begin(guardrails=[{"metric": "error", "maximum": 0.1, "interval": 0.01, "minimum_requests": 5}])
    for unit in [unit for unit in UNITS if trial.arm(unit) == 1][:10]:
        await trial.say(unit, prompt="crash")
    await asyncio.sleep(0.05)
    trial.server.backend.down = ""
    await trial.server.core.experiments.measure()
    trial.server.backend.down = None
    trial.log.change(ExperimentChange(experiment="tone", operation="stop"))
    await trial.do("start")
    await trial.server.core.experiments.measure()
    assert trial.log.standings()[0]["tone"].withdrawn == frozenset()
    treated = next(unit for unit in UNITS if trial.arm(unit, phase=2) == 1)
    assert version(await trial.say(treated)) == trial.treatment


async def test_a_guardrail_leaves_an_arm_that_is_well(trial: Trial) -> None:
    """The negative control of the test before: the same rule, answers that are right, and a client's own mistakes."""
    await trial.begin(guardrails=[{"metric": "error", "maximum": 0.1, "interval": 0.01, "minimum_requests": 5}])
    for unit in UNITS:
        await trial.say(unit)
        await trial.say(unit, prompt="bad")
    await asyncio.sleep(0.05)
    await trial.server.core.experiments.measure()
    assert trial.log.standings()[0]["tone"].withdrawn == frozenset()
    (told,) = (await trial.client.get("/v1/edits/experiments")).json()
    assert told["guardrails"][0]["last"]["result"] == "successful"


async def test_what_the_store_cannot_hear_is_told_later(trial: Trial) -> None:
    """The arm is withdrawn here all the same, and the entry is written when the store is back."""
    await trial.begin(guardrails=[{"metric": "error", "maximum": 0.1, "interval": 0.01, "minimum_requests": 5}])
    treated = [unit for unit in UNITS if trial.arm(unit) == 1]
    for unit in treated[:10]:
        await trial.say(unit, prompt="crash")
    await asyncio.sleep(0.05)
    trial.server.backend.down = ""
    await trial.server.core.experiments.measure()
    assert version(await trial.say(treated[0])) == "base"
    await trial.server.sync()
    assert version(await trial.say(treated[0])) == "base"
    trial.server.backend.down = None
    await trial.server.core.experiments.measure()
    assert trial.log.standings()[0]["tone"].withdrawn == {"milder"}


async def test_an_arm_that_does_not_answer_holds_the_ramp_until_a_person_resumes_it(trial: Trial) -> None:
    """Here at once, though the store is away; then by an entry. Requests were sent to it, and none came back whole."""
    rule = {"metric": "first_token_seconds", "maximum": 9, "interval": 0.01, "minimum_requests": 5,
            "inconclusive_limit": 0}  # fmt: skip
    await trial.begin(coverage=0.6, ramp=[{"after": "1h", "coverage": 1}], guardrails=[rule])
    experiments, start = trial.server.core.experiments, datetime.now(UTC)
    for unit in [unit for unit in UNITS if trial.arm(unit, 0.6) is not None]:
        for _ in range(2):
            await trial.say(unit, prompt="bad" if trial.arm(unit) == 1 else "Hello")
    await asyncio.sleep(0.05)
    trial.server.backend.down = ""
    await experiments.measure()
    (told,) = experiments.status()
    assert (told["ramp_held"], told["arms"][1]["by_control"]) == (True, "")
    trial.server.backend.down = None
    await experiments.measure()
    assert trial.log.history()[-1].operation == "hold"
    await trial.server.sync()
    experiments._now = lambda: start + timedelta(hours=2)
    assert experiments.status()[0]["coverage"] == 0.6
    await trial.do("resume")
    assert experiments.status()[0]["ramp_held"] is False


async def test_a_ramp_stands_still_while_the_store_cannot_be_read(trial: Trial) -> None:
    """Nobody could stop it meanwhile. Whoever was in an arm stays in it; when the store is back it goes on."""
    await trial.begin(coverage=0.1, ramp=[{"after": "1h", "coverage": 1}])
    experiments, start = trial.server.core.experiments, datetime.now(UTC)
    clock = [start]
    experiments._now = lambda: clock[0]
    early = {unit: version(await trial.say(unit)) for unit in UNITS}
    trial.server.backend.down = ""
    clock[0] = start + timedelta(hours=2)
    await trial.server.sync()
    assert {unit: version(await trial.say(unit)) for unit in UNITS} == early
    trial.server.backend.down = None
    await trial.server.sync()
    late = {unit: version(await trial.say(unit)) for unit in UNITS}
    assert all(late[unit] == trial.treatment for unit in UNITS if early[unit] == trial.treatment)
    assert sum(found == trial.treatment for found in late.values()) > sum(
        found == trial.treatment for found in early.values()
    )


async def test_a_restart_keeps_every_unit_in_its_arm(trial: Trial) -> None:
    await trial.begin(coverage=0.6)
    before = {unit: version(await trial.say(unit)) for unit in UNITS}
    again = Server(trial.server.store.url)
    await again.sync()
    for unit in UNITS:
        lease = await again.lease("polite", headers={"x-edits-unit": unit})
        with lease.hold():
            assert (lease.choice.version or "base") == before[unit]


async def test_a_promoted_arm_is_for_everybody_until_it_is_stopped(trial: Trial) -> None:
    """The control here is the base: clients of the variant get that, whatever the tag says."""
    await trial.begin()
    trial.log.promote("tone", "control")
    await trial.server.sync()
    assert {version(await trial.say(unit)) for unit in UNITS} == {"base"}
    await trial.do("stop")
    assert version(await trial.say("ann")) == trial.promoted


def edited_from(place: int) -> Any:
    """An engine's tokens where an edit shows from that place on."""
    return lambda step, arguments: step + (100 if CLAIM in (arguments or {}) and step >= place else 0)


async def comparison(trial: Trial) -> ShadowRecord:
    """The one there is, once it is."""

    def found() -> list[ShadowRecord]:
        written = trial.records() if trial.folder.exists() else []
        return [record for record in written if isinstance(record, ShadowRecord)]

    await until(lambda: bool(found()))
    (shadow_record,) = found()
    return shadow_record


@pytest.mark.parametrize("stream", [False, True])
async def test_two_answers_to_one_request_and_where_they_part(trial: Trial, stream: bool) -> None:
    """The client gets what the first says, word for word as without the second; the record says the rest."""
    await trial.begin()
    trial.engine.token = edited_from(3)  # type: ignore[method-assign]
    alone = await trial.ask(f"polite@{trial.promoted}", max_tokens=6, stream=stream)
    pair = {"x-edits-shadow": f"polite@{trial.promoted[:10]}, base"}
    answer = await trial.say("ann", pair, max_tokens=6, stream=stream)
    assert (version(answer), answer.text) == (trial.promoted, alone.text.replace(f"polite@{trial.promoted}", "polite"))
    found = await comparison(trial)
    first = 1 if stream else 0  # the engine's steps count from 1, a whole answer's tokens from 0
    assert (found.versions, found.differs_at) == ((trial.promoted, "base"), 3 - first)
    assert found.said == (Said(token=103, logprob=-103 / 8), Said(token=3, logprob=-3 / 8))
    assert (found.tokens, found.finish) == ((6, 6), ("length", "length"))
    assert trial.is_quiet()


async def test_answers_that_are_the_same_do_not_part(trial: Trial) -> None:
    await trial.begin()
    await trial.say("ann", {"x-edits-shadow": f"base,polite@{trial.promoted}"}, max_tokens=6)
    assert (await comparison(trial)).differs_at is None


async def test_a_share_of_the_controls_requests_is_answered_by_the_shadow_too(trial: Trial) -> None:
    """Drawn request by request, as evidence of the control alone."""
    await trial.begin(shadow={"arm": "milder", "share": 0.5})
    units = [unit for unit in UNITS if trial.arm(unit) == 0]
    for unit in units:
        assert version(await trial.say(unit)) == "base"
    await trial.say(next(unit for unit in UNITS if trial.arm(unit) == 1))
    await asyncio.sleep(0.2)
    pairs = [record for record in trial.records() if isinstance(record, ShadowRecord)]
    assert 0 < len(pairs) < len(units)
    assert {(pair.experiment, pair.versions) for pair in pairs} == {("tone", ("base", trial.treatment))}
    assert collect(trial.records(), "tone", 1).units == {"control": len(units), "milder": 1}


async def test_what_cannot_be_compared_is_refused_or_leaves_the_client_alone(trial: Trial) -> None:
    """Not two names, a name that is not there; a second one that fails is nobody's loss but the record's."""
    await trial.begin()
    wrong = await trial.say("ann", {"x-edits-shadow": "base"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-edits-shadow")
    assert (await trial.say("ann", {"x-edits-shadow": "rude,base"})).status_code == 404
    body, pair = {"model": "polit"}, {"x-edits-shadow": "base,base"}
    assert (await trial.client.post("/v1/completions", json=body, headers=pair)).status_code == 404
    answer = await trial.say("ann", {"x-edits-shadow": "base,rude"})
    assert version(answer) == "base"
    await asyncio.sleep(0.05)
    assert not trial.folder.exists()
    assert trial.is_quiet()


async def test_a_client_that_leaves_ends_both(trial: Trial) -> None:
    await trial.begin()
    trial.engine.pause()
    headers = {"x-edits-shadow": f"base,polite@{trial.promoted}"}
    call = Call(trial.app, {"model": "polite", "max_tokens": 6, "stream": True}, headers=headers)
    await until(lambda: trial.engine.running == 2)
    call.leave()
    await until(lambda: trial.engine.running == 0)
    assert trial.engine.aborted == 2
    await call.task
    trial.engine.resume()


async def test_a_flag_system_may_give_arms(trial: Trial, caplog: pytest.LogCaptureFixture) -> None:
    """Asked in OpenFeature's words. What it gives is no evidence; when it fails, or names no arm, the hash decides."""
    await trial.begin()
    asked: list[Any] = []

    def resolve(flag: str, default: str, context: dict[str, str]) -> str:
        asked.append((flag, default, context))
        if context["targetingKey"] == "down":
            raise OSError("no route")
        return {"friend": "milder", "typo": "mildr"}.get(context["targetingKey"], default)

    trial.server.core.experiments._resolver = Resolver(resolve)
    assert version(await trial.say("friend")) == trial.treatment
    names = ["control", "milder"]
    for unit in ("down", "typo", "typo", *UNITS[:10]):
        assert (version(await trial.say(unit)) == trial.treatment) == (trial.arm(unit) == 1)
    context = {"targetingKey": "friend", "source": "header", "experiment": "tone", "phase": "1"}
    assert asked[0] == ("edit.polite", names[trial.arm("friend") or 0], context)
    await trial.ask("tiny")
    await trial.say("friend", {"x-edits-arm": "control"})
    assert len(asked) == 14, "not asked where no experiment decides, nor where the request says itself"
    await asyncio.sleep(0.05)
    assert Counter(exposure.chosen for exposure in trial.exposures()) == {"forced": 2, "hash": 13}
    assert len(re.findall("the hash chooses the arm", caplog.text)) == 2


@pytest.mark.parametrize(
    ("where", "said"),
    [("json", "expected package.module:function"), ("no_such:f", "cannot be imported"),
     ("json:nothing", "cannot be imported"), ("json:__name__", "expected a function at json:__name__, found a str")],
)  # fmt: skip
async def test_a_resolver_that_cannot_be_had_is_refused(where: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Resolver.of(where)


async def test_a_promoted_arm_that_is_gone_is_an_error_and_never_the_control(trial: Trial) -> None:
    """Nobody would know: what is promoted is no evidence, so no line could say that the base answered instead."""
    await trial.begin()
    await trial.do("stop")
    arms = [
        {"name": name, "serves": serves, "weight": 0.5} for name, serves in (("control", "base"), ("all", "polite"))
    ]
    trial.log.create(Experiment.parse({"name": "tone", "model": "tone-test", "arms": arms}))
    await trial.do("start")
    trial.log.promote("tone", "all")
    await trial.server.sync()
    assert version(await trial.ask("tone-test")) == trial.promoted
    trial.server.store.withdraw("polite")
    await trial.server.sync()
    assert (await trial.ask("tone-test")).status_code == 404


async def test_files_are_begun_anew_when_they_are_full_and_a_full_disk_loses_lines_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = ExposureLog(tmp_path / "log", 300)
    records = [
        FeedbackRecord(
            at=datetime.now(UTC),
            request=str(number),
            experiment="tone",
            phase=1,
            arm="a",
            unit="u",
            metric="m",
            value=1,
        )
        for number in range(10)
    ]
    for record in records:
        log.write(record)
    assert len(list((tmp_path / "log").iterdir())) == 5
    assert sorted(Logs([tmp_path / "log"]), key=lambda record: record.request) == records
    (tmp_path / "file").write_text("")
    blocked = ExposureLog(tmp_path / "file" / "log", 300)
    blocked.write(records[0])
    blocked.write(records[0])
    assert blocked.lost == 2
    assert len(re.findall("exposures are lost", caplog.text)) == 1
