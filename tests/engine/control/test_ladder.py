"""Chunk lengths by position."""

from __future__ import annotations

from itertools import pairwise

import pytest

from longspan.engine.control.ladder import Ladder

K = 1_024
STRIDE = 253_952
"""Length of DCA's chunks in Qwen2.5-1M."""


def test_one_stage_has_chunks_of_one_length() -> None:
    ladder = Ladder(longest=32 * K, block_size=128)
    assert ladder.chunk(40 * K) == (32 * K, 64 * K)
    assert list(ladder.parts(5 * K, 70 * K)) == [
        (5 * K, 32 * K), (32 * K, 64 * K), (64 * K, 70 * K)]


@pytest.mark.parametrize(("stages", "counts"), [
    (2, [7, 4, 2, 2, 2, 2, 2, 2]), (4, [14, 7, 5, 4, 3, 3, 3, 3]),
    (8, [15, 14, 9, 7, 6, 6, 6, 6])])
def test_stretches_have_fewer_chunks_further_in(stages: int, counts: list[int]) -> None:
    ladder = Ladder(longest=STRIDE // 2, num_stages=stages, block_size=128)
    cuts = list(ladder.parts(0, 4 * STRIDE))
    assert [sum(start // (STRIDE // 2) == index for start, _ in cuts)
            for index in range(8)] == counts
    for start, stop in cuts:  # none has an end of DCA's chunks inside
        assert start // STRIDE == (stop - 1) // STRIDE


@pytest.mark.parametrize("longest", [256, 640, 768, 4 * K, 32 * K, STRIDE // 2, 128 * K])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7, 8, 16])
def test_chunks_follow_from_the_position_alone(longest: int, stages: int) -> None:
    ladder = Ladder(longest=longest, num_stages=stages, block_size=128)
    cuts = list(ladder.parts(0, 40 * longest))
    assert cuts[0][0] == 0 and all(left[1] == right[0] for left, right in pairwise(cuts))
    for start, stop in cuts[:-1]:
        assert start % 128 == stop % 128 == 0 and 0 < stop - start <= longest
        assert all(ladder.chunk(place) == (start, stop)
                   for place in (start, start + 1, (start + stop) // 2, stop - 1))
        assert ladder.whole(stop) == stop and ladder.whole(stop - 1) == start
    lengths = [stop - start for start, stop in cuts]
    assert all(left <= right + 128 for left, right in pairwise(lengths))  # longer ones further in
    assert (lengths[0] < lengths[-1]) == (stages > 1) or longest == 256
    begin = cuts[7][0] + 5  # a request that begins in the middle has the same cuts behind
    assert list(ladder.parts(begin, 40 * longest))[1:] == cuts[8:]


def test_chunks_are_not_shorter_than_is_worth_while() -> None:
    for longest, shortest in ((STRIDE // 2, 8_192), (16 * K, 4_096), (8 * K, 2_048), (256, 128)):
        ladder = Ladder(longest=longest, num_stages=64, block_size=128)
        start, stop = ladder.chunk(0)
        assert start == 0 and shortest <= stop < 1.1 * shortest


def test_stretches_that_are_not_whole_blocks_are_not_cut() -> None:
    assert Ladder(longest=700, num_stages=4, block_size=128).chunk(0) == (0, 700)
    assert Ladder(longest=640, num_stages=4, block_size=128).chunk(300) == (256, 384)
