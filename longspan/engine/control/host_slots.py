"""Slots for KV blocks in host memory: whose content they have, and which one goes first. No torch.

Every slot is *free*, *held* (a transfer reads or writes it, or a request will be loaded from it),
or *idle*: its content is known, and the longest unused one makes way for another.
"""

from __future__ import annotations

from collections import OrderedDict


class HostSlots:
    """The slots of one engine.

    Args:
        num_slots: ids 0 to num_slots - 1.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._holds: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Those that may be taken, the next victim first."""
        self.num_changes = 0
        """Times that content came or went."""

    @property
    def num_available(self) -> int:
        """Slots that `take` could hand out."""
        return len(self._free) + len(self._idle)

    @property
    def num_known(self) -> int:
        """Slots whose content can be used."""
        return len(self._slot_of)

    def find(self, value: bytes) -> int | None:
        """Return the slot with this content, if there is one."""
        return self._slot_of.get(value)

    def take(self) -> int | None:
        """Hold a slot for new content; None: all are held."""
        if self._free:
            slot = self._free.pop()
        elif self._idle:
            slot, _ = self._idle.popitem(last=False)
            del self._slot_of[self._hash_of.pop(slot)]
            self.num_changes += 1
        else:
            return None
        self._holds[slot] = 1
        return slot

    def hold(self, slot: int) -> None:
        """Keep a known slot as it is until `drop_hold`."""
        self._idle.pop(slot, None)
        self._holds[slot] = self._holds.get(slot, 0) + 1

    def fill(self, slot: int, value: bytes) -> None:
        """Make the content of a held slot findable. A second copy of known content is not."""
        assert self._holds[slot] > 0 and slot not in self._hash_of
        if value not in self._slot_of:
            self._slot_of[value] = slot
            self._hash_of[slot] = value
            self.num_changes += 1

    def forget(self, slot: int) -> bool:
        """Free a known slot whose content is not wanted any more; False: it is held."""
        if slot in self._holds:
            return False
        del self._idle[slot], self._slot_of[self._hash_of.pop(slot)]
        self._free.append(slot)
        self.num_changes += 1
        return True

    def drop_hold(self, slot: int, *, goes_first: bool = False) -> None:
        """Let go of a slot.

        Args:
            goes_first: it is the next to make way, for its content is elsewhere too.
        """
        self._holds[slot] -= 1
        if self._holds[slot]:
            return
        del self._holds[slot]
        if slot in self._hash_of:
            self._idle[slot] = None
            self._idle.move_to_end(slot, last=not goes_first)
        else:
            self._free.append(slot)

    def check(self) -> None:
        """Recount everything. Raises AssertionError when the accounts disagree."""
        assert sorted([*self._free, *self._holds, *self._idle]) == list(range(self.num_slots))
        assert {value: slot for slot, value in self._hash_of.items()} == self._slot_of
        assert self._idle.keys() <= self._hash_of.keys()
        assert not set(self._free) & self._hash_of.keys()
        assert all(count > 0 for count in self._holds.values())
