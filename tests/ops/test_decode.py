"""Split-KV decode against the specification: lengths, zones, groups, poisoned slots, batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.attention.divided_kv import held_keys
from longspan.attention.ranks import RankGroup
from longspan.ops import decode, reference
from longspan.ops.dense import eager
from longspan.ops.tiles.attend import merge
from longspan.ops.types import KeySpans, PagedKV
from tests.conftest import assert_close
from tests.ops import oracle
from tests.ops.oracle import Positions

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
ALL_DTYPES = [*DTYPES, pytest.param(torch.float16, id="fp16")]
LENGTHS = [1, 63, 111, 127, 128, 129]
# chunk_size, local_size: one zone only; borders on blocks; borders inside blocks; clamp reached
POSITIONS = [Positions(8192, 1024), Positions(96, 32), Positions(100, 37), Positions(300, 299)]


def run(
    cases: list[oracle.Case], impl: Any = decode, spans: KeySpans | None = None,
) -> tuple[Tensor, Tensor]:
    """The last token of each case, all in one cache and one batch."""
    first = cases[0]
    caches, tables, base = [], [], 0
    width = max(len(case.block_table) for case in cases)
    for case in cases:
        caches.append(case.cache)
        table = torch.full((width,), base, device=first.q.device)
        table[: len(case.block_table)] = case.block_table + base
        tables.append(table)
        base += case.cache.k.shape[0]
    cache = PagedKV(torch.cat([each.k for each in caches]), torch.cat([each.v for each in caches]))
    lens = torch.tensor([len(case.q) for case in cases], device=first.q.device)
    scales = torch.tensor([case.scale * (1 + 0.1 * row) for row, case in enumerate(cases)],
                          device=first.q.device)
    rotary = max((case.rotary for case in cases), key=lambda tables: tables.cos.shape[0])
    q = torch.stack([case.q[-1] for case in cases])
    return impl.decode_attention(q, cache, torch.stack(tables), lens, rotary, scales, spans)


def check(cases: list[oracle.Case]) -> None:
    out, lse = run(cases)
    expected, expected_lse = run(cases, reference)
    assert out.dtype == expected.dtype and lse.dtype == torch.float32
    assert_close(out, expected, "out")
    assert_close(lse, expected_lse, "lse", cases[0].q.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_and_zone(
    length: int, positions: Positions, dtype: torch.dtype, kernel_device: str
) -> None:
    """One request, NaN in every slot it does not own."""
    check([oracle.make_case(length, positions, num_heads=4, num_kv_heads=2, dtype=dtype,
                            device=kernel_device)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_context(dtype: torch.dtype, kernel_device: str) -> None:
    check([oracle.make_case(4097, Positions(300, 299), num_heads=4, num_kv_heads=2, head_dim=32,
                            block_size=128, dtype=dtype, device=kernel_device)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 1), (7, 1), (20, 1)])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_groups_and_head_dims(
    head_dim: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype, kernel_device: str
) -> None:
    """GQA 1:1 to 20:1, which is more than the smallest tile has rows."""
    check([oracle.make_case(
        70, Positions(64, 16), num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        block_size=32, dtype=dtype, device=kernel_device)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(5, 400, 1), (16, 17, 15, 33, 64)], ids=str)
def test_mixed_batches(lengths: tuple[int, ...], dtype: torch.dtype, kernel_device: str) -> None:
    """Each request keeps its own table, length and scale."""
    check([oracle.make_case(length, Positions(128, 40), num_heads=4, num_kv_heads=2, dtype=dtype,
                            device=kernel_device) for length in lengths])


def test_against_the_independent_oracle(kernel_device: str) -> None:
    positions = Positions(64, 16)
    case = oracle.make_case(257, positions, head_dim=32, device=kernel_device)
    out, lse = run([case])
    expected, expected_lse = oracle.dense(case, positions, 256)
    assert_close(out, expected, "out")
    assert_close(lse, expected_lse, "lse")


@pytest.mark.parametrize("capacity", [1, 3, 64])
def test_any_number_of_items(
    capacity: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One item for all keys, a few, one for each tile."""
    monkeypatch.setattr(decode, "num_programs", lambda device, rows: capacity)
    monkeypatch.setattr(decode, "MIN_TILES", 1)
    check([oracle.make_case(length, Positions(100, 37), num_heads=2, num_kv_heads=1,
                            device=kernel_device) for length in (200, 3, 90)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", [decode, eager], ids=["kernel", "eager"])
def test_parts_of_the_keys_merge_to_the_whole(
    impl: Any, dtype: torch.dtype, kernel_device: str
) -> None:
    """Blocks shared out among three, of requests in one zone and in several, with fewer blocks than
    sharers too."""
    cases = [oracle.make_case(length, Positions(100, 37), num_heads=4, num_kv_heads=2,
                              dtype=dtype, device=kernel_device) for length in (257, 5, 90)]
    lens = torch.tensor([257, 5, 90], device=kernel_device)
    blocks = -(-lens // cases[0].cache.k.shape[1])
    parts = []
    for part in range(3):
        first, stop = (torch.minimum(blocks * border // 3 * cases[0].cache.k.shape[1], lens)
                       for border in (part, part + 1))
        spans = KeySpans(first, stop - first)
        out, lse = run(cases, impl, spans)
        expected, expected_lse = run(cases, reference, spans)
        assert_close(out.to(dtype), expected, "out")
        assert_close(lse, expected_lse, "lse", dtype)
        assert (out[spans.length == 0] == 0).all()
        assert (lse[spans.length == 0] == -math.inf).all()
        parts.append((out.float(), lse))
    out, lse = merge(parts)
    expected, expected_lse = run(cases, reference)
    assert_close(out.to(dtype), expected, "merged out")
    assert_close(lse, expected_lse, "merged lse", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", [decode, eager], ids=["kernel", "eager"])
@pytest.mark.parametrize("positions", [Positions(100, 37), POSITIONS[0]], ids=str)
def test_parts_of_every_block_merge_to_the_whole(
    impl: Any, positions: Positions, dtype: torch.dtype, kernel_device: str
) -> None:
    """A cache that holds the first, the second, ... tokens of each block alone, of requests in one
    zone and in several, whose borders lie within blocks, and whose last block has nothing of some
    parts. Slots without a token are NaN."""
    lengths, block, parts = (417, 5, 90, 192), 64, []
    cases = [oracle.make_case(length, positions, num_heads=4, num_kv_heads=2, dtype=dtype,
                              block_size=block, device=kernel_device) for length in lengths]
    size = 4 if impl is eager else 2
    for rank in range(size):
        group = RankGroup(rank, size)
        spans = held_keys(torch.tensor(lengths, device=kernel_device), block, group)
        tokens = slice(rank * block // size, (rank + 1) * block // size)
        held = [case._replace(cache=PagedKV(*(part[:, tokens].contiguous() for part in (
            case.cache.k, case.cache.v)))) for case in cases]
        out, lse = run(held, impl, spans)
        expected, expected_lse = run(held, reference, spans)
        assert_close(out.to(dtype), expected, "out")
        assert_close(lse, expected_lse, "lse", dtype)
        assert (lse[spans.length == 0] == -math.inf).all()
        assert bool((spans.length == 0).any()) is (rank > 0)
        parts.append((out.float(), lse))
    out, lse = merge(parts)
    expected, expected_lse = run(cases, reference)
    assert_close(out.to(dtype), expected, "merged out")
    assert_close(lse, expected_lse, "merged lse", dtype)


def check_rows(case: oracle.Case, count: int) -> None:
    """The last ``count`` tokens of a case, as rows of one sequence."""
    cached_len = len(case.q) - count
    args = (case.q[cached_len:], case.cache, case.block_table, cached_len, case.rotary, case.scale)
    assert decode.takes_rows(args[0], case.cache, case.rotary)
    out, lse = decode.prefill_attention(*args)
    expected, expected_lse = reference.prefill_attention(*args)
    assert out.dtype == expected.dtype and lse.dtype == torch.float32
    assert_close(out, expected, "out")
    assert_close(lse, expected_lse, "lse", case.q.dtype)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("positions", [*POSITIONS[:3], Positions(40, 20)], ids=str)
@pytest.mark.parametrize(("length", "count"), [(1, 1), (5, 5), (63, 2), (131, 16)])
def test_few_rows_of_one_sequence(
    length: int, count: int, positions: Positions, dtype: torch.dtype, kernel_device: str
) -> None:
    """Causal among themselves, on one side and on both of a DCA chunk border; more rows than one
    launch takes, and NaN in every slot that no token has."""
    check_rows(oracle.make_case(length, positions, num_heads=14, num_kv_heads=2, dtype=dtype,
                                device=kernel_device), count)


@pytest.mark.parametrize("split", [1, 7])
@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
def test_rows_on_both_sides_of_a_chunk_border(
    chunks: int, split: int, kernel_device: str
) -> None:
    """Each of the zones is another one for the rows before the border and for those behind it."""
    positions = Positions(100, 37)
    check_rows(oracle.make_case(chunks * positions.stride + split, positions, num_heads=4,
                                num_kv_heads=2, device=kernel_device), 8)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "count"), [
    (2, 2, 16), (4, 1, 7), (7, 1, 18), (7, 1, 30), (20, 1, 6), (128, 1, 1)])
def test_rows_of_any_group(
    num_heads: int, num_kv_heads: int, count: int, kernel_device: str
) -> None:
    """From rows that share a tile of 16 to those that fill one of 128, in one launch or two."""
    check_rows(oracle.make_case(
        150, Positions(64, 16), num_heads=num_heads, num_kv_heads=num_kv_heads, block_size=32,
        device=kernel_device), count)


@pytest.mark.parametrize("capacity", [1, 3, 64])
def test_rows_that_see_nothing_of_an_item(
    capacity: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where items are small, the last ones hold keys of the last rows only."""
    monkeypatch.setattr(decode, "num_programs", lambda device, rows: capacity)
    monkeypatch.setattr(decode, "MIN_TILES", 1)
    check_rows(oracle.make_case(96, Positions(100, 37), num_heads=2, num_kv_heads=1,
                                device=kernel_device), 40)


def test_rows_against_the_independent_oracle(kernel_device: str) -> None:
    positions = Positions(64, 16)
    case = oracle.make_case(249, positions, head_dim=32, device=kernel_device)
    args = (case.q[236:], case.cache, case.block_table, 236, case.rotary, case.scale)
    out, lse = decode.prefill_attention(*args)
    expected, expected_lse = oracle.dense(case, positions, 236)
    assert_close(out, expected, "out")
    assert_close(lse, expected_lse, "lse")


def test_which_rows_the_kernel_takes() -> None:
    case = oracle.make_case(300, Positions(100, 37), num_heads=14, num_kv_heads=2)
    for count, taken in ((0, False), (1, True), (36, True), (37, False)):
        assert decode.takes_rows(case.q[:count], case.cache, case.rotary) is taken, count
    # in three DCA chunks
    assert not decode.takes_rows(case.q[:18], case.cache, case.rotary._replace(stride=17))


def test_an_empty_request_is_harmless(kernel_device: str) -> None:
    case = oracle.make_case(40, Positions(64, 16), device=kernel_device)
    lens = torch.tensor([0, 40], device=kernel_device)
    out, lse = decode.decode_attention(
        case.q[-1:].expand(2, -1, -1), case.cache, case.block_table.expand(2, -1), lens,
        case.rotary, torch.full((2,), case.scale, device=kernel_device))
    assert out[0].eq(0).all() and lse[0].eq(-math.inf).all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()


def test_strided_queries_and_wide_tables(kernel_device: str) -> None:
    """Queries are a slice of the merged projection; tables may be wider than any request."""
    case = oracle.make_case(100, Positions(64, 16), num_heads=4, num_kv_heads=2,
                            device=kernel_device)
    wide = torch.full((1, 50), 10**6, device=kernel_device)
    wide[0, : len(case.block_table)] = case.block_table
    merged = torch.full((1, 8, 16), math.nan, device=kernel_device)
    merged[:, :4] = case.q[-1:]
    args = (case.rotary, torch.tensor([case.scale], device=kernel_device))
    lens = torch.tensor([100], device=kernel_device)
    out, _ = decode.decode_attention(merged[:, :4], case.cache, wide, lens, *args)
    expected, _ = reference.decode_attention(
        case.q[-1:], case.cache, case.block_table[None], lens, *args)
    assert_close(out, expected)


def test_what_the_kernel_does_not_take() -> None:
    def cache(block_size: int, head_dim: int) -> PagedKV:
        return PagedKV(*(torch.zeros(2, block_size, 2, head_dim) for _ in range(2)))

    assert decode.supports(cache(128, 64), 6)
    for unsupported in (cache(128, 80), cache(7, 64), cache(8, 64), cache(128, 8)):
        assert not decode.supports(unsupported, 6)
    assert not decode.supports(cache(128, 64), 5)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel_device", ["cuda"], indirect=True)
def test_past_two_to_the_31_elements(kernel_device: str) -> None:
    """A block whose elements lie beyond what 32 bits can index."""
    num_blocks, shape = 2**31 // (128 * 2 * 128) + 70, (128, 2, 128)
    k, v = (torch.empty(num_blocks, *shape, dtype=torch.bfloat16, device=kernel_device)
            for _ in range(2))
    small = PagedKV(*(torch.randn(2, *shape, device=kernel_device).bfloat16() for _ in range(2)))
    k[-2:], v[-2:] = small.k, small.v
    rotary = oracle.moved(oracle.tables(128, Positions(4096, 64), 256), kernel_device)
    q = torch.randn(1, 14, 128, device=kernel_device).bfloat16()
    rest = (torch.tensor([200], device=kernel_device), rotary,
            torch.tensor([0.09], device=kernel_device))
    table = torch.tensor([[num_blocks - 2, num_blocks - 1]], device=kernel_device)
    out, _ = decode.decode_attention(q, PagedKV(k, v), table, *rest)
    expected, _ = reference.decode_attention(q, small, table - num_blocks + 2, *rest)
    assert_close(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel_device", ["cuda"], indirect=True)
def test_replayed_from_a_cuda_graph(kernel_device: str) -> None:
    """Lengths, tables and scales may change between replays."""
    case = oracle.make_case(700, Positions(128, 40), num_heads=14, num_kv_heads=2, head_dim=64,
                            dtype=torch.bfloat16, device=kernel_device)
    q, lens = case.q[-2:].clone(), torch.tensor([700, 1], device=kernel_device)
    args = (q, case.cache, case.block_table.expand(2, -1), lens, case.rotary,
            torch.tensor([0.1, 0.2], device=kernel_device))
    decode.decode_attention(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode.decode_attention(*args)
    for pair in ((700, 1), (17, 650), (128, 129)):
        lens.copy_(torch.tensor(pair))
        graph.replay()
        expected, expected_lse = reference.decode_attention(*args)
        assert_close(out, expected)
        assert_close(lse, expected_lse, "lse", torch.bfloat16)
