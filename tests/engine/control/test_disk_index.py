"""The index of files: chains, room, order of use."""

from __future__ import annotations

from longspan.engine.control.disk_index import DiskIndex
from longspan.engine.kv_file import StoredRun


def run(name: str, parent: str = "", *, size: int = 10, count: int = 1) -> StoredRun:
    """A file whose last block's hash is its name."""
    hashes = [f"{name}{index}".encode() for index in range(count - 1)] + [name.encode()]
    return StoredRun(name=name, key=b"k", hashes=tuple(hashes), parent=parent.encode(),
                     num_bytes=size)


def test_a_run_goes_before_those_that_it_continues() -> None:
    index = DiskIndex([run("a"), run("b", "a"), run("c", "b"), run("x")], 40)
    assert index.make_room(10) == ["c"], "of two chains the one used longest ago, from its end"
    assert index.make_room(20) == ["b"]
    assert index.find(b"a") == "a" and index.find(b"c") is None and index.num_bytes == 20
    index.check()


def test_a_run_does_not_take_the_room_of_those_that_it_continues() -> None:
    index = DiskIndex([run("x"), run("a"), run("b", "a")], 30)
    assert index.make_room(20, b"b") is None and index.num_known == 3
    assert index.make_room(10, b"b") == ["x"], "used before them, and of another chain"
    index.add(run("c", "b"))
    assert index.make_room(10, b"c") is None and index.make_room(10) == ["c"]
    index.check()


def test_what_is_read_or_used_stays() -> None:
    index = DiskIndex([run("a"), run("b"), run("c")], 30)
    index.begin_read("a")
    index.end_read("a")
    index.begin_read("b")
    assert index.make_room(20) == ["c", "a"]
    assert index.make_room(30) is None and index.find(b"b") == "b"
    index.end_read("b")
    assert index.make_room(30) == ["b"]
    index.check()


def test_other_engines_files_take_room_and_are_deleted_in_their_turn() -> None:
    theirs = StoredRun(name="theirs", key=b"other", hashes=(), num_bytes=25)
    index = DiskIndex([theirs, run("a")], 40)
    assert index.make_room(10) == ["theirs"]
    assert index.num_known == 1


def test_nothing_is_forgotten_for_what_never_fits() -> None:
    index = DiskIndex([run("a"), run("b")], 20)
    assert index.make_room(21) is None
    assert index.num_known == 2


def test_a_damaged_chain_that_names_itself_ends() -> None:
    index = DiskIndex([run("a", "b"), run("b", "a")], 20)
    index.touch("a")
    assert index.num_known == 2


def test_old_files_make_way_where_the_disk_is_full_before_the_budget_is_used() -> None:
    index = DiskIndex([], 1_000)
    for name in "abc":
        index.add(StoredRun(name=name, key=b"k", hashes=(name.encode(),), num_bytes=80))
    assert index.make_room(80) == []
    index.note_full(80)
    assert index.make_room(80) == ["a"]
    for name in "defghijk":  # there is room after all
        index.add(StoredRun(name=name, key=b"k", hashes=(name.encode(),), num_bytes=80))
        index.note_written(80)
        assert index.make_room(80) is not None
    assert index.num_bytes == 240, "eight files have won the room of one"
    index.note_full(80)
    for name in "bcdefghijk":
        index.remove(name)
    index.note_full(80)
    assert index.make_room(80) == [], "one is tried where there is none"
