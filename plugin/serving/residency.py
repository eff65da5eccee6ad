"""Which version sits in which slot, and who is still using it.

No torch, no vLLM, no IO: callers do what `plan` says and report back with `commit` or `abandon`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Install a version into `slot`, after clearing out `evicted` if somebody idle sits there."""

    slot: int
    evicted: str | None


@dataclass
class Resident:
    """A version in a slot. `users` counts the requests that read it; `retired` ones leave with their last user.

    One that is `closed` makes way for a version that waits for a slot: it is lent to nobody more.
    """

    slot: int
    users: int = 0
    retired: bool = False
    closed: bool = False


class Residency:
    """Slots 1 to `slots`; slot 0 is the base model's and never given out."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._free = list(range(slots, 0, -1))
        self._resident: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self._planned: dict[str, int] = {}

    @property
    def used(self) -> int:
        """Slots that hold or are about to hold a version."""
        return self.slots - len(self._free)

    def residents(self) -> dict[str, Resident]:
        """Every resident version, least recently used first."""
        return dict(self._resident)

    def is_resident(self, version: str) -> bool:
        return version in self._resident

    def is_open(self, version: str) -> bool:
        """Whether it may be acquired."""
        return version in self._resident and not self._resident[version].closed

    def plan(self, version: str) -> Placement | None:
        """Where to put a version that is not resident, or None while every slot is in use. The slot is held for it."""
        if version in self._resident or version in self._planned:
            raise ValueError(f"version {version[:12]} has a slot already")
        evicted = None
        if not self._free:
            evicted = next((name for name, resident in self._resident.items() if resident.users == 0), None)
            if evicted is None:
                return None
            self._free.append(self._resident.pop(evicted).slot)
        slot = self._free.pop()
        self._planned[version] = slot
        return Placement(slot, evicted)

    def commit(self, version: str) -> None:
        """The planned version is installed on every worker: it may be used."""
        self._resident[version] = Resident(self._planned.pop(version))

    def abandon(self, version: str) -> int:
        """The planned version could not be installed. Its slot, now cleared, is free again."""
        slot = self._planned.pop(version)
        self._free.append(slot)
        return slot

    def lose(self, version: str) -> None:
        """The planned version could not be installed and its slot not be cleared: the slot is out of use for good."""
        del self._planned[version]

    def acquire(self, version: str) -> int:
        """Count one more user of an open version; returns its slot."""
        resident = self._resident[version]
        if resident.closed:
            raise ValueError(f"version {version[:12]} is closed, because another version waits for its slot")
        resident.users += 1
        self._resident.move_to_end(version)
        return resident.slot

    def release(self, version: str) -> None:
        """Count one user less."""
        resident = self._resident[version]
        if resident.users == 0:
            raise ValueError(f"version {version[:12]} is released more often than acquired")
        resident.users -= 1

    def make_way(self, count: int) -> bool:
        """Have so many versions closed, of those in use; returns whether one was opened again.

        Retired ones first, which hardly anybody asks for, then those with the fewest users, which are soon idle.
        """
        soonest = sorted(self._resident.values(), key=lambda resident: (not resident.retired, resident.users))
        closed = [resident for resident in soonest if resident.closed]
        others = [resident for resident in soonest if resident.users and not resident.closed]
        for resident in others[: max(0, count - len(closed))]:
            resident.closed = True
        for resident in closed[count:]:
            resident.closed = False
        return len(closed) > count

    def retire(self, version: str) -> None:
        """Nothing names this version any more: let it leave with its last user."""
        if version in self._resident:
            self._resident[version].retired = True

    def restore(self, version: str) -> None:
        """Something names this version again."""
        if version in self._resident:
            self._resident[version].retired = False

    def leaving(self) -> list[str]:
        """Retired versions without users: clear their slots, then `remove` them."""
        return [name for name, resident in self._resident.items() if resident.retired and resident.users == 0]

    def remove(self, version: str) -> int:
        """Take an unused version out; returns the slot to clear before anybody else is planned into it."""
        resident = self._resident[version]
        if resident.users:
            raise ValueError(f"version {version[:12]} is in use")
        del self._resident[version]
        return resident.slot

    def give_back(self, slot: int) -> None:
        """A removed version's slot is cleared on every worker."""
        self._free.append(slot)
