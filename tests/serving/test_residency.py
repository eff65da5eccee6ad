"""Which version sits in which slot: any order of events keeps the rules."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from tests.support.fakes import cheaply
from vllm_edits.plugin.serving.residency import Placement, Residency

VERSIONS = [f"version-{number}" for number in range(6)]


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Residency beside a naive model of it: a dictionary of slots, a list in order of use, and sets."""

    requests = Bundle("requests")
    uncleared = Bundle("uncleared")

    def __init__(self) -> None:
        super().__init__()
        self.slots = 3
        self.residency = Residency(self.slots)
        self.by_use: list[str] = []  # resident versions, least recently used first
        self.slot_of: dict[str, int] = {}
        self.users: dict[str, int] = {}
        self.retired: set[str] = set()
        self.closed: set[str] = set()
        self.planned: dict[str, int] = {}
        self.clearing: set[int] = set()

    @rule(version=st.sampled_from(VERSIONS))
    def plan(self, version: str) -> None:
        if version in self.slot_of or version in self.planned:
            with pytest.raises(ValueError, match="has a slot already"):
                self.residency.plan(version)
            return
        idle = [name for name in self.by_use if not self.users[name]]
        free = self.slots - len(self.slot_of) - len(self.planned) - len(self.clearing)
        plan = self.residency.plan(version)
        if free:
            assert plan is not None
            assert plan.evicted is None
        elif idle:
            assert plan == Placement(self.slot_of.pop(idle[0]), idle[0])  # the idle one that was used longest ago
            self.by_use.remove(idle[0])
            self.retired.discard(idle[0])
            self.closed.discard(idle[0])
            del self.users[idle[0]]
        else:
            assert plan is None
        if plan is not None:
            self.planned[version] = plan.slot

    @precondition(lambda self: self.planned)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(self.planned)))
        self.residency.commit(version)
        self.slot_of[version] = self.planned.pop(version)
        self.users[version] = 0
        self.by_use.append(version)

    @precondition(lambda self: self.planned)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(self.planned)))
        assert self.residency.abandon(version) == self.planned.pop(version)

    @precondition(lambda self: self.slot_of)
    @rule(target=requests, data=st.data())
    def acquire(self, data: st.DataObject) -> object:
        version: str = data.draw(st.sampled_from(sorted(self.slot_of)))
        if version in self.closed:
            with pytest.raises(ValueError, match="is closed, because another version waits"):
                self.residency.acquire(version)
            return multiple()
        assert self.residency.acquire(version) == self.slot_of[version]
        self.users[version] += 1
        self.by_use.remove(version)
        self.by_use.append(version)
        return version

    @rule(version=consumes(requests))
    def release(self, version: str) -> None:
        """A version in use is always still there: nothing evicted it."""
        self.residency.release(version)
        self.users[version] -= 1

    @rule(count=st.integers(0, 4))
    def make_way(self, count: int) -> None:
        """As many are closed as are wanted and in use, no one that was closed is exchanged for another."""
        before = self.closed
        opened = self.residency.make_way(count)
        self.closed = {name for name, one in self.residency.residents().items() if one.closed}
        in_use = {name for name in self.slot_of if self.users[name]}
        assert len(self.closed) == min(count, len(before | in_use))
        assert self.closed <= before or before <= self.closed
        assert opened == bool(before - self.closed)
        for name in self.closed - before:
            rank = (name not in self.retired, self.users[name])
            assert all(rank <= (one not in self.retired, self.users[one]) for one in in_use - self.closed)

    @rule(version=st.sampled_from(VERSIONS))
    def retire(self, version: str) -> None:
        self.residency.retire(version)
        if version in self.slot_of:
            self.retired.add(version)

    @rule(version=st.sampled_from(VERSIONS))
    def restore(self, version: str) -> None:
        self.residency.restore(version)
        self.retired.discard(version)

    @rule(target=uncleared)
    def sweep(self) -> object:
        """Retired versions leave with their last user, and their slots come back when they are cleared."""
        leaving = self.residency.leaving()
        assert set(leaving) == {version for version in self.retired if not self.users[version]}
        for version in leaving:
            slot = self.residency.remove(version)
            assert slot == self.slot_of.pop(version)
            self.by_use.remove(version)
            self.retired.discard(version)
            self.closed.discard(version)
            del self.users[version]
            self.clearing.add(slot)
        return multiple(*sorted(self.clearing)) if leaving else multiple()

    @rule(slot=consumes(uncleared))
    def cleared(self, slot: int) -> None:
        if slot in self.clearing:
            self.clearing.discard(slot)
            self.residency.give_back(slot)

    @invariant()
    def slots_are_conserved(self) -> None:
        """Every slot of 1 to n is free, planned, resident or being cleared: one of them, once. Slot 0 never is."""
        taken = [*self.slot_of.values(), *self.planned.values(), *self.clearing]
        assert sorted([*taken, *self.residency._free]) == list(range(1, self.slots + 1))
        assert self.residency.used == len(taken)

    @invariant()
    def the_residents_are_those_of_the_model(self) -> None:
        found = self.residency.residents()
        assert list(found) == self.by_use
        assert {name: (one.slot, one.users, one.retired) for name, one in found.items()} == {
            name: (self.slot_of[name], self.users[name], name in self.retired) for name in self.by_use
        }
        assert all(self.residency.is_resident(name) == (name in self.slot_of) for name in VERSIONS)
        assert all(self.residency.is_open(name) == (name in {*self.slot_of} - self.closed) for name in VERSIONS)


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
TestAnyOrderOfEvents.settings = settings(cheaply, stateful_step_count=40)


def resident(slots: int, *versions: str) -> Residency:
    residency = Residency(slots)
    for version in versions:
        assert residency.plan(version) is not None
        residency.commit(version)
    return residency


def test_the_least_recently_used_idle_version_is_evicted() -> None:
    """Use is counted when a request comes; who is in use is passed over however long ago that was."""
    residency = resident(3, "a", "b", "c")
    residency.acquire("a")  # in use, and used longest ago in a moment
    for version in ("c", "b"):
        residency.acquire(version)
        residency.release(version)
    plan = residency.plan("d")
    assert plan is not None
    assert plan.evicted == "c"


def test_nothing_is_planned_while_every_slot_is_in_use() -> None:
    residency = resident(1, "a")
    residency.acquire("a")
    assert residency.plan("b") is None
    residency.release("a")
    assert residency.plan("b") == Placement(1, "a")


def test_those_with_the_fewest_users_make_way_and_retired_ones_before_them() -> None:
    residency = resident(3, "a", "b", "c")
    for version, users in {"a": 3, "b": 2, "c": 1}.items():
        for _ in range(users):
            residency.acquire(version)
    residency.retire("a")
    assert not residency.make_way(2)
    assert [residency.is_open(version) for version in "abc"] == [False, True, False]
    assert residency.make_way(1)  # the one that nobody asks for stays closed
    assert [residency.is_open(version) for version in "abc"] == [False, True, True]


def test_a_planned_slot_is_not_planned_twice() -> None:
    residency = Residency(1)
    assert residency.plan("a") == Placement(1, None)
    assert residency.plan("b") is None


def test_a_version_in_use_cannot_be_removed_or_released_too_often() -> None:
    residency = resident(1, "a")
    residency.acquire("a")
    with pytest.raises(ValueError, match="in use"):
        residency.remove("a")
    residency.release("a")
    with pytest.raises(ValueError, match="more often than acquired"):
        residency.release("a")
