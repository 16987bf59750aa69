"""Prefill cuts at absolute multiples, and what may be shared."""

from __future__ import annotations

import pytest

from longspan.engine.chunking import cacheable_len, next_chunk_len


@pytest.mark.parametrize(("cached_len", "prompt_len", "budget", "sparse", "expected"), [
    (0, 100, 32, False, 32),
    (0, 20, 32, False, 20),
    (32, 100, 32, True, 32),
    (96, 100, 32, True, 4),
    (40, 100, 32, False, 24),  # from inside a chunk, only to its end
    (0, 100, 16, False, 16),  # a busy step: dense is shortened to whole blocks
    (0, 100, 19, False, 16),
    (0, 100, 7, False, 0),
    (4, 100, 13, False, 12),
    (0, 100, 31, True, 0),  # sparse waits
    (96, 100, 4, True, 4),
    (0, 100, 0, False, 0),
])
def test_next_chunk_len(
    cached_len: int, prompt_len: int, budget: int, sparse: bool, expected: int,
) -> None:
    assert next_chunk_len(
        cached_len=cached_len, prompt_len=prompt_len, prefill_chunk_len=32, budget=budget,
        block_size=8, sparse=sparse) == expected


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
