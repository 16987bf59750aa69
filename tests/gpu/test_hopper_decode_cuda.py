"""Hopper's decode, compiled, against the specification and the portable kernel: int8 and bf16 keys,
several sequences, both released strides, few rows, graphs, every launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.ops import decode, reference
from longspan.ops.dense import hopper_decode
from longspan.ops.dense.hopper_decode import Launch
from tests.conftest import assert_close
from tests.gpu.syncs import no_syncs
from tests.gpu.test_decode_cuda import RELEASED
from tests.gpu.test_int8_kv_cuda import as_int8
from tests.gpu.test_prefill_cuda import Case, make_case, poisoned_outputs  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]
KINDS = [True, False]


def make(length: int, is_int8: bool, **options: Any) -> Case:
    """NaN in every slot that no token has, and in the scales there."""
    case = make_case(length, **options)
    return as_int8(case, length) if is_int8 else case


def batch(case: Case, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Requests that begin as a case does and end where they like: q, tables, lengths, scales."""
    device = case.q.device
    q = torch.randn(len(lengths), *case.q.shape[1:], device=device, dtype=case.q.dtype)
    scales = case.scale * (1 + 0.05 * torch.arange(len(lengths), device=device))
    return (q, case.block_table.repeat(len(lengths), 1), torch.tensor(lengths, device=device),
            scales)


def compare(found: tuple[Tensor, Tensor], args: tuple[Any, ...]) -> None:
    """Against the specification; requests without a token have no output."""
    q, cache, tables, lens, rotary, scales = args
    some = lens > 0
    out, lse = found
    assert out[~some].eq(0).all() and lse[~some].eq(float("-inf")).all()
    if some.any():
        expected, expected_lse = reference.decode_attention(
            q[some], cache, tables[some], lens[some], rotary, scales[some])
        assert_close(out[some], expected, f"out, {lens.tolist()}")
        assert_close(lse[some], expected_lse, f"lse, {lens.tolist()}", torch.bfloat16)


def check(case: Case, lengths: list[int], **options: int | Launch) -> None:
    """A token of each request: right, the same twice, and without a wait."""
    q, tables, lens, scales = batch(case, lengths)
    args = (q, case.cache, tables, lens, case.rotary, scales)
    assert hopper_decode.supports(q, case.cache, case.rotary)
    with no_syncs():
        out, lse = hopper_decode.attend(*args, 1, **options)  # type: ignore[arg-type]
        again, again_lse = hopper_decode.attend(*args, 1, **options)  # type: ignore[arg-type]
    compare((out, lse), args)
    assert torch.equal(out, again) and torch.equal(lse, again_lse), lengths


@pytest.mark.parametrize("is_int8", KINDS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 1_000, 20_011])
def test_one_sequence(length: int, is_int8: bool) -> None:
    check(make(length, is_int8), [length])


@pytest.mark.parametrize("is_int8", KINDS)
@pytest.mark.parametrize(("chunk_size", "local_size"), RELEASED)
def test_sequences_about_a_released_stride(
    chunk_size: int, local_size: int, is_int8: bool
) -> None:
    """Alone and beside shorter ones: one before each border, behind it, and in a third chunk."""
    stride = chunk_size - local_size
    length = 2 * stride + 5_001
    case = make(length, is_int8, chunk_size=chunk_size, local_size=local_size, heads=14, kv_heads=2)
    for lengths in ([length], [stride, stride + 1, 2 * stride + 1, 7, 2 * stride, length]):
        check(case, lengths)


@pytest.mark.parametrize("is_int8", KINDS)
def test_short_chunks(is_int8: bool) -> None:
    """One program has keys of all zones, shares end within requests, padding stands among them."""
    case = make(2_400, is_int8, chunk_size=320, local_size=64)
    for lengths in ([2_400], [0, 2_400, 0], [1, 256, 257, 512, 513, 700, 2_400, 129, 128], [0, 0],
                    [2_000 - i for i in range(33)]):
        for programs in (1, 3, 33, 66, 200):
            check(case, lengths, programs=programs)


@pytest.mark.parametrize("heads", [(28, 4), (40, 8), (32, 4), (8, 8), (32, 1), (64, 1)], ids=str)
@pytest.mark.parametrize("is_int8", KINDS)
def test_every_group(heads: tuple[int, int], is_int8: bool) -> None:
    check(make(3_000, is_int8, chunk_size=1_280, local_size=256, heads=heads[0], kv_heads=heads[1]),
          [3_000, 900])


@pytest.mark.parametrize("launch", [
    Launch(2, 3, 80), Launch(2, 2, 80), Launch(1, 6, 168), Launch(1, 3, 168)], ids=str)
def test_every_launch(launch: Launch) -> None:
    case = make(30_000, True, chunk_size=8_192, local_size=512)
    check(case, [30_000, 4_000], launch=launch)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 16, 18])
def test_few_rows(count: int) -> None:
    """8 lanes to twice 64; the rows stand on both sides of a border."""
    for length in (700, 2 * 1_024 + count // 2, 9_001):
        case = make(length, True, chunk_size=1_280, local_size=256)
        args = case.args(length - count)
        assert hopper_decode.takes_rows(args[0], case.cache, case.rotary)
        with no_syncs():
            out, lse = hopper_decode.prefill_attention(*args)
        expected, expected_lse = reference.prefill_attention(*args)
        assert_close(out, expected, f"{count} rows of {length}")
        assert_close(lse, expected_lse, "lse", torch.bfloat16)


@pytest.mark.parametrize("is_int8", KINDS)
def test_a_graph_reads_what_its_tensors_hold(is_int8: bool) -> None:
    """Recorded once, and replayed with other queries, which lie apart, lengths and tables."""
    case = make(20_000, is_int8, chunk_size=8_192, local_size=512)
    _, tables, lens, scales = batch(case, [20_000, 5_000, 0, 131])
    wide = torch.randn(4, 28 + 8, 128, device="cuda", dtype=torch.bfloat16)
    args = (wide[:, :28], case.cache, tables, lens, case.rotary, scales)
    hopper_decode.decode_attention(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = hopper_decode.decode_attention(*args)
    for seed, lengths in enumerate(([20_000, 5_000, 0, 131], [129, 8_193, 16_400, 1])):
        torch.manual_seed(seed)
        wide.normal_()
        lens.copy_(torch.tensor(lengths, device="cuda"))
        tables[1:, :8] = case.block_table[:8].flip(0)
        graph.replay()
        compare((out, lse), args)


@pytest.mark.parametrize("is_int8", KINDS)
def test_both_kernels_agree_behind_a_million_keys(is_int8: bool) -> None:
    case = make(1_000_000, is_int8, chunk_size=262_144, local_size=8_192, heads=7, kv_heads=1)
    q, tables, lens, scales = batch(case, [1_000_000, 600_001])
    args = (q, case.cache, tables, lens, case.rotary, scales)
    for one, other in zip(hopper_decode.decode_attention(*args), decode.decode_attention(*args),
                          strict=True):
        assert_close(one, other, "a million", torch.bfloat16)
