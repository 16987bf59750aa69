"""Prefill cuts at absolute multiples, and what may be shared."""

from __future__ import annotations

import pytest

from longspan.engine.control.chunking import (
    Piece,
    cacheable_len,
    chunk_pieces,
    chunk_stop,
    piece_rows,
    row_cuts,
    tail_start,
)
from longspan.engine.control.ladder import Ladder


@pytest.mark.parametrize(("cached_len", "prompt_len", "tail", "expected"), [
    (0, 100, 0, 32),
    (0, 20, 0, 20),
    (40, 100, 0, 64),  # from inside a chunk, only to its end
    (96, 100, 0, 100),
    (64, 100, 88, 88),  # a chunk ends where the tail begins
    (88, 100, 88, 100),  # which is one chunk, whatever multiples lie in it
    (88, 130, 88, 120),  # unless it is longer than that
    (120, 130, 88, 130),
    (32, 100, 88, 64),
    (96, 100, 100, 100),  # no tail
])
def test_chunk_stop(cached_len: int, prompt_len: int, tail: int, expected: int) -> None:
    assert chunk_stop(cached_len, prompt_len, Ladder(longest=32), tail) == expected


def test_the_tail_starts_at_a_block() -> None:
    assert tail_start(100, 10, 8) == 88  # 90, at a multiple of 5
    assert tail_start(109, 10, 8) == 88  # 95: another question of nearly the same length
    assert tail_start(101, 0, 8) == 101  # no tail
    assert tail_start(7, 10, 8) == 0
    for length in range(1, 300):
        start = tail_start(length, 10, 8)
        assert start % 8 == 0 and min(length, 10) <= length - start < 10 + 5 + 8


def test_rows_are_cut_at_absolute_multiples() -> None:
    assert row_cuts(32, 64, 16) == [32, 48, 64]
    assert row_cuts(32, 60, 16) == [32, 48, 60]
    assert row_cuts(32, 64, 1 << 30) == [32, 64]
    assert row_cuts(40, 44, 16) == [40, 44]


def test_pieces_of_a_chunk() -> None:
    def pieces(stop: int, is_scored: bool = False, **sizes: int) -> list[Piece]:
        found = chunk_pieces(32, stop, is_scored=is_scored, **sizes)
        for shares in zip(*found, strict=True):
            assert sum(shares) == pytest.approx(1)
        return found

    assert len(pieces(64, num_layers=6, rows=16)) == 5 * (2 + 2) + 1
    assert len(pieces(60, num_layers=6, rows=64)) == 5 * (2 + 1) + 1
    assert pieces(64, num_layers=1, rows=16) == [(1.0, 1.0, 1.0)]
    scored = pieces(64, num_layers=6, rows=16, is_scored=True)  # the head has pieces too
    assert len(scored) == 6 * (2 + 2) + 2
    assert len(pieces(64, num_layers=1, rows=16, is_scored=True)) == (2 + 2) + 2
    found = pieces(60, num_layers=3, rows=16)  # rows 32-47 and 48-59
    assert found[:4] == found[4:8]
    projection, selection, first, second = found[:4]
    assert projection[1:] == (0.0, 0.0) and selection == (0.0, 0.0, 0.5)
    assert second.attention / first.attention == pytest.approx(12 / 16)


def test_pieces_have_whole_tiles_where_they_can() -> None:
    assert (piece_rows("cpu", 16_384), piece_rows("cuda", 32_768)) == (4_096, 32_768)
    assert piece_rows("cuda", 131_072) == 65_536
    assert (piece_rows("cuda", 126_976), piece_rows("cuda", 100_000)) == (63_488, 65_536)
    assert piece_rows("cpu", 256) == 256


@pytest.mark.parametrize(("num_tokens", "prompt_len", "sparse", "expected"), [
    (31, 100, False, 24),
    (100, 100, False, 96),
    (120, 100, False, 120),  # completions too
    (100, 100, True, 88),  # up to the tail, and none of it
    (88, 100, True, 88),
    (87, 100, True, 64),  # the chunk before the tail is not whole
    (95, 200, True, 64),
    (120, 100, True, 88),  # no completions
    (3, 3, True, 0),
    (300, 100, True, 88),
])
def test_cacheable_len(num_tokens: int, prompt_len: int, sparse: bool, expected: int) -> None:
    assert cacheable_len(
        num_tokens=num_tokens, prompt_len=prompt_len, ladder=Ladder(longest=32), block_size=8,
        sparse=sparse, tail_len=10) == expected


def test_shared_is_what_ends_with_a_chunk() -> None:
    """Whatever is known, what is reused of it ends where one of the prompt's own chunks does."""
    for tail_len in (0, 10, 70):
        for prompt_len in range(1, 200, 7):
            tail, ends = tail_start(prompt_len, tail_len, 8), [0]
            while ends[-1] < prompt_len:
                ends.append(chunk_stop(ends[-1], prompt_len, Ladder(longest=32), tail))
            first = tail if tail < prompt_len else 0
            whole = [end for end in ends if end < prompt_len or (end - first) % 32 == 0]
            for known in range(250):
                assert cacheable_len(
                    num_tokens=known, prompt_len=prompt_len, ladder=Ladder(longest=32),
                    block_size=8, sparse=True, tail_len=tail_len) == max(
                        end for end in whole if end <= known)
