"""The dense prefill kernel against the specification; split and merged, too."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

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


class Parts:
    """The kernel, launched for some parts of the keys alone; the others are left empty."""

    def __init__(self, parts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel, self.parts = prefill._dense_kernel, parts
        builder = interpreter.InterpreterBuilder
        original = builder.set_grid_idx

        def place(self: Any, x: int, y: int, z: int) -> None:
            original(self, x, y, z)
            if self.grid_dim[1] == len(parts):  # the kernel's grid, and no other one's
                self.grid_idx = x, parts[y], z

        monkeypatch.setattr(builder, "set_grid_idx", place)

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            args[4].zero_()
            args[5].fill_(-math.inf)
            self.kernel[grid[0], len(self.parts)](*args, **options)

        return launch


@pytest.mark.parametrize("kernel_device", ["cpu"], indirect=True, ids=["interpreted"])
@pytest.mark.parametrize("positions", [Positions(262_144, 8_192), Positions(131_072, 4_096)],
                         ids=["253952", "126976"])
def test_keys_around_released_strides(
    positions: Positions, kernel_device: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows on both sides of the second border; of the keys, which cannot all be interpreted in
    time, the parts in which zones begin and end, and one in the middle of each zone. `tests/gpu`
    has all keys."""
    stride, tile, share = positions.stride, 16, 13
    case = oracle.make_case(2 * stride + 5, positions, num_heads=1)
    start = 2 * stride - 3
    splits = -(-2 * stride // tile // share)
    border = stride // tile // share
    assert stride // tile % share, "a zone's border lies inside a part"
    parts = [0, border // 2, border - 1, border, border + border // 2, splits - 1]
    args = (case.q[start:], case.cache, case.block_table, start, case.rotary, case.scale)
    monkeypatch.setattr(prefill, "_dense_kernel", Parts(parts, monkeypatch))
    out, lse = prefill.split_prefill_attention(*args, splits)

    rows, keys = torch.arange(start, start + 8), torch.arange(2 * stride + 5)
    k, v = reference.gather_kv(case.cache, case.block_table, len(keys))
    # The own tile belongs to the first part. One tile more for the last rows makes no other parts.
    seen = torch.isin(keys // tile // share, torch.tensor(parts))[None] & (keys <= rows[:, None])
    seen |= (keys // tile == rows[:, None] // tile) & (keys <= rows[:, None])
    scores = reference.dca_scores(case.q[start:], k, rows, keys, case.rotary).double() * case.scale
    scores = scores.masked_fill(~seen, -math.inf)
    expected = torch.einsum("hts,sd->thd", scores.softmax(-1), v[:, 0].double())
    assert_close(out, expected, "out")
    assert_close(lse, scores.logsumexp(-1).T, "lse")


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
