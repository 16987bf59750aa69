"""Prefill cuts at absolute multiples, and what may be shared."""

from __future__ import annotations

import pytest

from longspan.engine.control.chunking import (
    cacheable_len,
    chunk_stop,
    piece_rows,
    piece_shares,
    row_cuts,
    sparse_stop,
)


@pytest.mark.parametrize(("cached_len", "prompt_len", "num_sparse", "expected"), [
    (0, 100, 0, 32),
    (0, 20, 0, 20),
    (40, 100, 0, 64),  # from inside a chunk, only to its end
    (96, 100, 0, 100),
    (64, 100, 88, 88),  # the sparse part ends where the dense tail begins
    (88, 100, 88, 96),  # from there on at the multiples again
    (32, 100, 88, 64),
    (96, 100, 100, 100),  # no tail
])
def test_chunk_stop(cached_len: int, prompt_len: int, num_sparse: int, expected: int) -> None:
    assert chunk_stop(cached_len, prompt_len, 32, num_sparse) == expected


def test_the_sparse_part_ends_at_a_block() -> None:
    assert sparse_stop(100, 10, 8) == 88  # the tail starts at 90
    assert sparse_stop(101, 0, 8) == 101  # no tail: everything


def test_rows_are_cut_at_absolute_multiples() -> None:
    assert row_cuts(32, 64, 16) == [32, 48, 64]
    assert row_cuts(32, 60, 16) == [32, 48, 60]
    assert row_cuts(32, 64, 1 << 30) == [32, 64]
    assert row_cuts(40, 44, 16) == [40, 44]


def test_pieces_of_a_chunk() -> None:
    def shares(stop: int, is_scored: bool = False, **sizes: int) -> list[float]:
        return piece_shares(32, stop, is_scored=is_scored, **sizes)

    assert len(shares(64, num_layers=6, rows=16)) == 5 * (2 + 2) + 1
    assert len(shares(60, num_layers=6, rows=64)) == 5 * (2 + 1) + 1
    assert shares(64, num_layers=1, rows=16) == [1.0]
    scored = shares(64, num_layers=6, rows=16, is_scored=True)  # the head has pieces too
    assert len(scored) == 6 * (2 + 2) + 2 and sum(scored) == pytest.approx(1)
    found = shares(60, num_layers=3, rows=16)  # rows 32-47 and 48-59
    assert sum(found) == pytest.approx(1) and found[:4] == found[4:8]
    assert found[3] / found[2] == pytest.approx(12 / 16)
    assert (piece_rows("cpu", 16_384), piece_rows("cuda", 32_768)) == (4_096, 32_768)
    assert piece_rows("cuda", 131_072) == 65_536
    assert piece_rows("cpu", 256) == 256


@pytest.mark.parametrize(("num_tokens", "prompt_len", "sparse", "expected"), [
    (31, 100, False, 24),
    (100, 100, False, 96),
    (120, 100, False, 120),  # completions too
    (100, 100, True, 96),  # beyond the tail's start: every full block
    (95, 100, True, 64),  # the tail starts at 90, in a chunk that is not whole
    (90, 100, True, 64),  # 88 in full blocks
    (100, 106, True, 96),
    (95, 200, True, 64),
    (120, 100, True, 120),
    (3, 3, True, 0),
])
def test_cacheable_len(num_tokens: int, prompt_len: int, sparse: bool, expected: int) -> None:
    assert cacheable_len(
        num_tokens=num_tokens, prompt_len=prompt_len, prefill_chunk_len=32, block_size=8,
        sparse=sparse, dense_tail_len=10) == expected
