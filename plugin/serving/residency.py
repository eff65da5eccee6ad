"""The assignment of versions to slots, with the number of users of each. Pure.

It needs neither torch nor vLLM and does no IO: callers carry out a `plan` and report with `commit` or `abandon`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """A plan: install a version into `slot`, and clear `evicted` first, if that version is in the slot."""

    slot: int
    evicted: str | None


@dataclass
class Resident:
    """A version in a slot.

    users: number of requests that use it. retired: it leaves with its last user. closed: it accepts no new users,
    because another version waits for a slot.
    """

    slot: int
    users: int = 0
    retired: bool = False
    closed: bool = False


class Residency:
    """The slots 1 to `slots`. Slot 0 is the base model's and is never assigned."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._free = list(range(slots, 0, -1))
        self._resident: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self._planned: dict[str, int] = {}

    @property
    def used(self) -> int:
        """The number of slots with a version, or with a planned version."""
        return self.slots - len(self._free)

    def residents(self) -> dict[str, Resident]:
        """Every resident version, least recently used first."""
        return dict(self._resident)

    def is_resident(self, version: str) -> bool:
        return version in self._resident

    def is_open(self, version: str) -> bool:
        """True if the version is in a slot and accepts new users."""
        return version in self._resident and not self._resident[version].closed

    def plan(self, version: str) -> Placement | None:
        """Plan a slot for a version, and keep the slot for it. None while every slot is in use."""
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
        """Report that the planned version is installed on every worker and can be used."""
        self._resident[version] = Resident(self._planned.pop(version))

    def abandon(self, version: str) -> int:
        """Report that the planned version could not be installed, and its slot was cleared. The slot is free again."""
        slot = self._planned.pop(version)
        self._free.append(slot)
        return slot

    def lose(self, version: str) -> None:
        """Report that the planned version could not be installed, nor its slot cleared. The slot is lost."""
        del self._planned[version]

    def acquire(self, version: str) -> int:
        """Add a user to an open version; returns its slot."""
        resident = self._resident[version]
        if resident.closed:
            raise ValueError(f"version {version[:12]} is closed, because another version waits for its slot")
        resident.users += 1
        self._resident.move_to_end(version)
        return resident.slot

    def release(self, version: str) -> None:
        """Remove a user from a version."""
        resident = self._resident[version]
        if resident.users == 0:
            raise ValueError(f"version {version[:12]} is released more often than acquired")
        resident.users -= 1

    def make_way(self, count: int) -> bool:
        """Close versions in use until `count` are closed, or open them again. True if one was opened again.

        Retired versions are closed first, because they have few new requests; then versions with the fewest users.
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
        """Retire a version that has no name any more: it leaves with its last user."""
        if version in self._resident:
            self._resident[version].retired = True

    def restore(self, version: str) -> None:
        """End the retirement of a version that has a name again."""
        if version in self._resident:
            self._resident[version].retired = False

    def leaving(self) -> list[str]:
        """Retired versions without users. The caller removes them and clears their slots."""
        return [name for name, resident in self._resident.items() if resident.retired and resident.users == 0]

    def remove(self, version: str) -> int:
        """Remove an unused version; returns its slot, which must be cleared before it is used again."""
        resident = self._resident[version]
        if resident.users:
            raise ValueError(f"version {version[:12]} is in use")
        del self._resident[version]
        return resident.slot

    def give_back(self, slot: int) -> None:
        """Report that the slot of a removed version was cleared on every worker."""
        self._free.append(slot)
