"""Slots of host memory: what is known, what is held, what goes first."""

from __future__ import annotations

from longspan.engine.control.host_slots import HostSlots


def filled(slots: HostSlots, *values: bytes) -> None:
    """Take a slot for each value and let go of it."""
    for value in values:
        slot = slots.take()
        assert slot is not None
        slots.fill(slot, value)
        slots.drop_hold(slot)


def test_the_longest_unused_content_goes_first() -> None:
    slots = HostSlots(3)
    filled(slots, b"a", b"b", b"c")
    used = slots.find(b"a")
    assert used is not None
    slots.hold(used)
    slots.drop_hold(used)
    filled(slots, b"d")
    assert slots.find(b"b") is None
    assert [slots.find(value) is not None for value in (b"a", b"c", b"d")] == [True] * 3
    slots.check()


def test_what_is_elsewhere_too_goes_before_all_others() -> None:
    slots = HostSlots(2)
    filled(slots, b"a")
    slot = slots.take()
    assert slot is not None
    slots.fill(slot, b"b")
    slots.drop_hold(slot, goes_first=True)
    filled(slots, b"c")
    assert slots.find(b"b") is None and slots.find(b"a") is not None


def test_held_slots_are_not_taken() -> None:
    slots = HostSlots(2)
    filled(slots, b"a", b"b")
    first, second = slots.find(b"a"), slots.find(b"b")
    assert first is not None and second is not None
    slots.hold(first)
    slots.hold(first)
    slots.hold(second)
    assert slots.take() is None and slots.num_available == 0
    slots.drop_hold(first)
    assert slots.take() is None, "it was held twice"
    slots.drop_hold(first)
    assert slots.take() == first
    assert slots.find(b"a") is None
    slots.check()


def test_a_second_copy_is_not_kept() -> None:
    slots = HostSlots(2)
    filled(slots, b"a", b"a")
    assert slots.num_known == 1 and slots.num_available == 2
    slots.check()
