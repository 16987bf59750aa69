"""Chunk lengths by position."""

from __future__ import annotations

from itertools import pairwise

import pytest

from longspan.engine.control.ladder import Ladder

K = 1_024


def test_one_stage_has_chunks_of_one_length() -> None:
    ladder = Ladder(longest=32 * K, block_size=128)
    assert ladder.rungs == ((0, 32 * K),)
    assert list(ladder.parts(5 * K, 70 * K)) == [
        (5 * K, 32 * K), (32 * K, 64 * K), (64 * K, 70 * K)]


@pytest.mark.parametrize(("stages", "rungs"), [
    (2, ((0, 8 * K), (64 * K, 16 * K), (256 * K, 32 * K))),
    (4, ((0, 8 * K), (128 * K, 16 * K), (512 * K, 32 * K))),
    (8, ((0, 8 * K), (256 * K, 16 * K), (1024 * K, 32 * K)))])
def test_rungs_grow_with_the_root_of_the_position(
    stages: int, rungs: tuple[tuple[int, int], ...],
) -> None:
    assert Ladder(longest=32 * K, num_stages=stages, block_size=128).rungs == rungs


@pytest.mark.parametrize("longest", [256, 640, 768, 4 * K, 32 * K, 128 * K])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7, 8])
def test_chunks_follow_from_the_position_alone(longest: int, stages: int) -> None:
    ladder = Ladder(longest=longest, num_stages=stages, block_size=128)
    cuts = list(ladder.parts(0, 40 * longest))
    assert cuts[0][0] == 0 and all(left[1] == right[0] for left, right in pairwise(cuts))
    for start, stop in cuts[:-1]:
        assert start % 128 == stop % 128 == 0 and 0 < stop - start <= longest
        assert all(ladder.chunk(place) == (start, stop)
                   for place in (start, start + 1, (start + stop) // 2, stop - 1))
        assert ladder.whole(stop) == stop and ladder.whole(stop - 1) == start
    lengths = [stop - start for start, stop in cuts[:-1]]
    assert lengths == sorted(lengths)  # longer ones further in
    begin = cuts[7][0] + 5  # a request that begins in the middle has the same cuts behind
    assert list(ladder.parts(begin, 40 * longest))[1:] == cuts[8:]


def test_a_length_that_cannot_be_halved_stays() -> None:
    assert Ladder(longest=640, num_stages=4, block_size=128).rungs == ((0, 640),)
    assert Ladder(longest=768, num_stages=2, block_size=128).rungs == ((0, 384), (3_072, 768))
