"""Who has which rows and heads: every one exactly once, evenly, at whole units."""

from __future__ import annotations

import random

import numpy as np
import pytest

from longspan.attention.division import SharedSlice, divide
from longspan.attention.ranks import (
    LEAST_ROWS,
    RankGroup,
    RowSharing,
    head_parts,
    row_unit,
    share_heads,
    share_rows,
)
from longspan.attention.sparsity import SparsityPlan


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_rows_are_shared_evenly_and_causal_work_too(size: int) -> None:
    rng = random.Random(size)
    for _ in range(50):
        unit = rng.choice([1, 8, 128])
        start = rng.choice([0, unit * rng.randrange(50), rng.randrange(5000)])
        stop = start + 2 * size * unit * rng.randrange(1, 9) + rng.randrange(unit)
        ranges = share_rows(start, stop, unit, size, are_alike=rng.random() < 0.5)
        every = sorted(part for own in ranges for part in own)
        assert [every[0][0], every[-1][1]] == [start, stop]
        assert all(one[1] == other[0] for one, other in zip(every, every[1:], strict=False))
        assert all(place % unit == 0 for part in every for place in part
                   if place not in (start, stop))
        rows = [sum(end - begin for begin, end in own) for own in ranges]
        assert max(rows) - min(rows) <= 2 * unit and min(rows) > 0
    work = [sum((end * end - begin * begin) / 2 for begin, end in own)
            for own in share_rows(0, 131_072, 128, size)]
    assert max(work) == pytest.approx(min(work), rel=1e-2)  # halves would differ by 3 to 1


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(28, 4), (40, 8), (4, 2), (14, 2), (8, 8)])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_heads_are_shared_with_their_keys(num_heads: int, num_kv_heads: int, size: int) -> None:
    if size > num_heads:
        return
    shared, group = share_heads(num_heads, num_kv_heads, size), num_heads // num_kv_heads
    assert [head for part in shared for head in range(*part)] == list(range(num_heads))
    counts = [stop - start for start, stop in shared]
    assert max(counts) - min(counts) <= 1 or num_kv_heads % size == 0
    for own in shared:
        parts = head_parts(own, group)
        assert [head for part in parts for head in range(*part.heads)] == list(range(*own))
        for part in parts:
            count, kv_count = (stop - start for start, stop in part)
            assert count % kv_count == 0  # as a selection takes them: equal groups
            assert [head // group for head in range(*part.heads)] == [
                part.kv_heads[0] + index // (count // kv_count) for index in range(count)]


def test_short_slices_and_paper_mode_are_not_divided() -> None:
    sharing = RowSharing(RankGroup(0, 2), 16, 1)
    assert not sharing.share(32, 95, may_split=True).is_split
    assert not sharing.share(32, 1000, may_split=False).is_split
    assert sharing.share(32, 96, may_split=True).ranges == (((32, 48), (80, 96)), ((48, 80),))
    # of a sparse slice as well, until history is as long as the slice
    assert sharing.share(32, 96, may_split=True, sparse=True).ranges == (
        ((32, 48), (80, 96)), ((48, 80),))
    assert sharing.share(64, 128, may_split=True, sparse=True).ranges == (
        ((64, 96),), ((96, 128),))
    assert sharing.share(64, 128, may_split=True).ranges == (((64, 80), (112, 128)), ((80, 112),))
    plan = SparsityPlan.default(1, 1)
    assert row_unit(None, 16) == row_unit(plan, 16) == 16
    assert not RowSharing(RankGroup(0, 2), row_unit(plan.paper(), 16), 1).share(
        0, 1000, may_split=True).is_split


def test_few_rows_are_shared_far_in_alone() -> None:
    sharing = RowSharing(RankGroup(0, 2), 128, 1, LEAST_ROWS["cuda"])
    assert not sharing.share(130_048, 131_072, may_split=True, sparse=True).is_split
    assert sharing.share(126_976, 130_048, may_split=True, sparse=True).is_split
    assert sharing.share(998_912, 1_000_000, may_split=True, sparse=True).is_split
    divided = sharing._replace(divides_kv=True)  # no rank has all keys
    assert divided.share(130_048, 131_072, may_split=True, sparse=True).is_split


def test_pairs_of_a_slice_that_every_rank_has_are_counted_once() -> None:
    counted = [RowSharing(RankGroup(rank, 3), 16, 1).share(0, 20, may_split=True).counts
               for rank in range(3)]
    assert counted == [True, False, False]


@pytest.mark.parametrize("size", [2, 3])
def test_a_divided_step_stores_every_key_once_and_finds_every_output(size: int) -> None:
    rng = random.Random(size)
    for _ in range(30):
        lens = [rng.choice([1, 5, 100, 333]) for _ in range(4)] + [400]
        rng.shuffle(lens)
        cached = [rng.randrange(200) for _ in lens]
        packed, outputs = list[list[int]](), list[list[int]]()
        for rank in range(size):
            sharing = RowSharing(RankGroup(rank, size), 16, 1)
            slices = [
                SharedSlice(None if length == 1 else sharing.share(
                    start, start + length, may_split=True), start, length, int(length != 5))
                for start, length in zip(cached, lens, strict=True)]
            division, order = divide(sharing.group, slices)
            stored = order[order >= 0]
            assert sorted(stored.tolist()) == list(range(sum(lens)))
            rows, whole = list[int](), 0
            for item in slices:
                ranges = (((item.cached_len, item.cached_len + item.query_len),)
                          if item.share is None else item.share.own)
                rows += [position - item.cached_len + whole for part in ranges
                         for position in range(*part)]
                whole += item.query_len
            packed.append(rows)
            outputs.append(division.wanted.tolist())
            owners = division.owners.tolist()
            split = np.concatenate([np.arange(*part) for part in division.split])
            sent = np.array(rows)[split]
            assert (order[rank * division.most :][: len(sent)] == sent).all()
            others = [rows[row] for part in division.others for row in range(*part)]
            assert order[size * division.most :].tolist() == others
        ends = np.cumsum(lens) - 1
        wanted = [int(end) for end, length in zip(ends, lens, strict=True) if length != 5]
        assert wanted == [
            packed[owner][outputs[owner][index]] for index, owner in enumerate(owners)]
