"""The dense prefill kernel against the specification; split and merged, too."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from longspan.ops import reference
from longspan.ops.dense import triton as prefill
from longspan.ops.tiles.splits import num_splits, supports
from longspan.ops.types import PagedKV
from tests.conftest import assert_close
from tests.ops import oracle
from tests.ops.oracle import Case, Positions

PLAIN = Positions(4096, 96)
ZONED = Positions(64, 16)  # stride 48
# positions, cached length, queries, query heads, KV heads, head dim, block size
SHAPES = [
    pytest.param(PLAIN, 0, 1, 1, 1, 16, 16, id="one-token"),
    pytest.param(PLAIN, 0, 63, 7, 1, 16, 32, id="from-zero"),
    pytest.param(PLAIN, 200, 1, 7, 1, 16, 32, id="one-token-late"),
    pytest.param(PLAIN, 37, 111, 2, 2, 32, 32, id="unaligned-history"),
    pytest.param(PLAIN, 64, 32, 3, 3, 16, 32, id="whole-tiles"),
    pytest.param(ZONED, 0, 129, 1, 1, 16, 16, id="all-zones"),
    pytest.param(ZONED, 48, 32, 8, 2, 16, 16, id="one-dca-chunk"),
    pytest.param(ZONED, 141, 12, 4, 1, 16, 16, id="history-ends-in-a-tile"),
    pytest.param(Positions(100, 4), 95, 300, 1, 1, 16, 32, id="over-borders"),
    pytest.param(Positions(64, 48), 200, 30, 2, 1, 16, 16, id="stride-of-one-tile"),
    pytest.param(Positions(4096, 101), 5, 40, 2, 1, 16, 16, id="odd-stride-never-reached"),
]


@pytest.mark.parametrize(
    ("positions", "cached_len", "num_queries", "heads", "kv_heads", "head_dim", "block_size"),
    SHAPES)
def test_dense_equals_reference(
    positions: Positions, cached_len: int, num_queries: int, heads: int, kv_heads: int,
    head_dim: int, block_size: int, kernel_device: str,
) -> None:
    case = oracle.make_case(
        cached_len + num_queries, positions, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, block_size=block_size, device=kernel_device)
    check(case, cached_len, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("splits", "cached_len", "num_queries"), [
    pytest.param(1, 100, 20, id="whole"), pytest.param(3, 100, 20, id="parts"),
    pytest.param(2, 193, 1, id="one-token"), pytest.param(5, 0, 20, id="more-parts-than-tiles"),
])
def test_parts_of_the_keys_are_merged(
    splits: int, cached_len: int, num_queries: int, dtype: torch.dtype, kernel_device: str
) -> None:
    """Parts without any key among them, and borders of zones inside and between parts."""
    case = oracle.make_case(cached_len + num_queries, ZONED, num_heads=4, num_kv_heads=2,
                            dtype=dtype, device=kernel_device)
    check(case, cached_len, splits)


def check(case: Case, cached_len: int, splits: int) -> None:
    dtype = case.q.dtype
    args = (case.q[cached_len:], case.cache, case.block_table, cached_len, case.rotary, case.scale)
    out, lse = prefill.split_prefill_attention(*args, splits)
    expected_out, expected_lse = reference.prefill_attention(*args)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.is_contiguous() and lse.is_contiguous()
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse", dtype)


def test_rows_of_a_wider_projection(kernel_device: str) -> None:
    """q as the QKV projection leaves it: heads side by side in a longer row."""
    case = oracle.make_case(90, ZONED, num_heads=4, device=kernel_device)
    wide = torch.full((40, 6, 16), math.nan, device=kernel_device)
    wide[:, :4] = case.q[50:]
    args = (case.cache, case.block_table, 50, case.rotary, case.scale)
    out, lse = prefill.prefill_attention(wide[:, :4], *args)
    expected_out, expected_lse = reference.prefill_attention(case.q[50:], *args)
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse")


def test_large_scores_stay_finite(kernel_device: str) -> None:
    case = oracle.make_case(100, ZONED, num_heads=2, gain=30.0, device=kernel_device)
    args = (case.q[60:], case.cache, case.block_table, 60, case.rotary, case.scale)
    for splits in (1, 3):
        out, lse = prefill.split_prefill_attention(*args, splits)
        expected_out, expected_lse = reference.prefill_attention(*args)
        assert lse.abs().max() > 500
        assert_close(lse, expected_lse, "lse")
        assert_close(out, expected_out, "out", torch.bfloat16)  # fp32 scores hold 1e-4 absolute


@pytest.mark.parametrize(("num_items", "key_tiles", "expected"), [
    (28, 8192, 9),  # 128 tokens after a million: 252 programs on 132 multiprocessors, 2 waves
    (28, 15, 1),  # too short to cut
    (28, 40, 2),  # parts keep 16 tiles
    (7168, 8192, 1),  # a whole prefill chunk
])
def test_splits_fill_the_device(num_items: int, key_tiles: int, expected: int) -> None:
    assert num_splits(num_items, key_tiles, 132) == expected


def test_supports() -> None:
    def answer(dtype: torch.dtype = torch.bfloat16, head_dim: int = 128, block: int = 128,
               stride: int = 1024, is_cuda: bool = True) -> bool:
        rotary = oracle.tables(16, PLAIN, 1)._replace(stride=stride)
        q = SimpleNamespace(shape=(1, 1, head_dim), dtype=dtype, is_cuda=is_cuda,
                            stride=lambda axis: 1)
        cache = PagedKV(*(torch.zeros(1, block, 1, head_dim, dtype=dtype) for _ in range(2)))
        return supports(q, cache, rotary, 5000)  # type: ignore[arg-type]

    assert answer() and answer(torch.float16) and answer(head_dim=64)
    assert answer(stride=5001) and not answer(stride=1000)  # never reached; no multiple
    assert not answer(torch.float32) and answer(torch.float32, is_cuda=False)
    assert not answer(head_dim=80) and not answer(block=256) and not answer(block=24)
