"""Keys and values in int8: rounding, gains, what kernels write and read, poisoned slots."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longspan import ops
from longspan.attention.cache import allocate_cache
from longspan.ops import decode, int8_kv, reference
from longspan.ops.dense import eager as eager_dense
from longspan.ops.quant import triton_kv
from longspan.ops.types import PagedKV
from tests.conftest import assert_close, error_ratio
from tests.ops import oracle
from tests.ops.oracle import Positions

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


def int8_cache(
    num_blocks: int, block_size: int, heads: int, dim: int, *, gain: Tensor | None = None,
    dtype: torch.dtype = torch.float32, device: str = "cpu", means: bool = True,
) -> PagedKV:
    """All scales NaN (uninitialised memory is), numbers as far from 0 as they get."""
    cache = allocate_cache(
        num_blocks=num_blocks, block_size=block_size, num_kv_heads=heads, head_dim=dim, dtype=dtype,
        device=device, means=means, k_gain=torch.ones(heads, dim) if gain is None else gain)
    cache.k.fill_(127)
    cache.v.fill_(-128)
    return cache


def as_int8(case: oracle.Case, gain: Tensor | None = None) -> oracle.Case:
    """The same request, its keys and values in int8."""
    length, device = len(case.q), case.q.device
    num_blocks, block_size, heads, dim = case.cache.k.shape
    cache = int8_cache(num_blocks, block_size, heads, dim, gain=gain, dtype=case.q.dtype,
                       device=str(device), means=False)
    position = torch.arange(length, device=device)
    slots = case.block_table[position // block_size] * block_size + position % block_size
    k, v = reference.gather_kv(case.cache, case.block_table, length)
    int8_kv.store(cache, k, v, slots, slots[:0])
    return case._replace(cache=cache)


def test_rounding() -> None:
    x = torch.tensor([[0.0, 1.27, -0.634, 0.006], [0.0] * 4, [1e-38, 0, 0, -3e38]])
    numbers, scales = int8_kv.quantised(x)
    assert numbers.tolist()[:2] == [[0, 127, -63, 1], [0] * 4]
    assert numbers[2, 3] == -127 and scales[1] == 0 and scales.isfinite().all()
    wide = torch.randn(999, 128) * torch.rand(999, 1) * 100
    numbers, scales = int8_kv.quantised(wide)
    assert ((numbers * scales[:, None] - wide).abs() <= 0.5001 * scales[:, None]).all()
    assert numbers.abs().amax(-1).eq(127).all()


def test_gains() -> None:
    """Powers of two, the same for both channels of a rotation; the root of how far one stands
    out."""
    vectors = torch.ones(2, 8)
    vectors[0, 1], vectors[0, 5], vectors[1, 6] = 300.0, -40.0, 18.0
    vectors[1, 0] = vectors[1, 4] = 0.06
    gains = int8_kv.key_gains(vectors)
    assert gains[0].tolist() == [1, 16, 1, 1, 1, 16, 1, 1]
    assert gains[1].tolist() == [0.25, 1, 4, 1, 0.25, 1, 4, 1]
    assert int8_kv.key_gains(torch.zeros(2, 8)).eq(1).all()


def test_gains_keep_what_large_biases_take() -> None:
    """Scores behind a bias as Qwen2.5's are ten times nearer with gains than without."""
    bias = torch.zeros(1, 64)
    bias[0, 3], bias[0, 40] = 180.0, -90.0
    case = oracle.make_case(300, Positions(8192, 1024), num_heads=2, num_kv_heads=1, head_dim=64,
                            gain=1.0, k=torch.randn(300, 1, 64) + bias)
    q = case.q.clone()
    q[..., [3, 35, 8, 40]] *= 0.05  # as trained: what is large is not asked for much
    errors = []
    for gain in (None, int8_kv.key_gains(bias + 1.0)):
        stored, _ = reference.gather_kv(as_int8(case, gain).cache, case.block_table, 300)
        exact, _ = reference.gather_kv(case.cache, case.block_table, 300)
        errors.append(float(((q[:, :1] * (stored - exact)).sum(-1)).square().mean()))
    assert errors[1] < 0.1 * errors[0], errors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 70])
def test_what_is_written(count: int, dtype: torch.dtype, kernel_device: str) -> None:
    """The kernels write what the specification does, and nothing else: a chunk from the middle of a
    block, across a DCA border, one row of it padding; means of full blocks."""
    block_size, cached = 16, 37
    rotary = oracle.moved(oracle.tables(16, Positions(64, 16), 10_000), kernel_device)
    gain = int8_kv.key_gains(torch.tensor([[1.0] * 16, [1.0, 90.0] + [1.0] * 14]))
    caches = [int8_cache(12, block_size, 2, 16, gain=gain, dtype=dtype, device=kernel_device)
              for _ in range(2)]
    table = torch.randperm(12)
    position = torch.arange(cached + count)
    slots = table[position // block_size] * block_size + position % block_size
    merged = torch.randn(cached + count, 8, 16).to(kernel_device, dtype)
    merged[1, 5] = 0
    for start, stop in ((0, cached), (cached, cached + count)):
        full = torch.cat((table[start // block_size : stop // block_size], torch.tensor([-1])))
        part = slots[start:stop].clone()
        part[0] = -1 if start == 0 else part[0]
        for impl, cache in zip((triton_kv, reference), caches, strict=True):
            impl.store_kv(
                cache, merged[start:stop, 4:6], merged[start:stop, 6:],
                position[start:stop].to(kernel_device), part.to(kernel_device),
                full.to(kernel_device), rotary)
    ours, wanted = (cache.by_block() for cache in caches)
    for name in ("k_scale", "v_scale", "k_mean", "v_mean"):
        assert torch.equal(ours[name].isnan(), wanted[name].isnan()), name
        assert_close(ours[name].nan_to_num(), wanted[name].nan_to_num(), name, dtype)
    for name in ("k", "v"):
        assert (ours[name].int() - wanted[name].int()).abs().max() <= 1, name
    tables = table.to(kernel_device), cached + count
    (found, order), (expected, _) = (
        impl.dense_kv(caches[0], *tables) for impl in (triton_kv, int8_kv))
    assert order.tolist() == list(range(-(-(cached + count) // block_size)))
    for name in ("k", "v"):
        actual, right = (part.by_block()[name].flatten(0, 1)[1 : cached + count]
                         for part in (found, expected))
        assert actual.dtype == dtype
        assert_close(actual, right, name)
    exact = reference.rotate(merged[:, 4:6], *(
        part[(position % rotary.stride).to(kernel_device)] for part in (rotary.cos, rotary.sin)))
    assert error_ratio(actual, merged[1 : cached + count, 6:]) < 0.015
    keys = found.k.flatten(0, 1)[1 : cached + count]
    assert error_ratio(keys, exact[1:]) < 0.015


def test_scratch_memory_is_used(kernel_device: str) -> None:
    case = as_int8(oracle.make_case(100, Positions(64, 16), device=kernel_device))
    shape = (9, *case.cache.k.shape[1:])
    scratch = [torch.full(shape, 7.0, device=kernel_device) for _ in range(2)]
    cache = case.cache._replace(k_scratch=scratch[0], v_scratch=scratch[1])
    found, _ = triton_kv.dense_kv(cache, case.block_table, 100)
    assert found.k.data_ptr() == scratch[0].data_ptr()
    assert scratch[0][7:].eq(7).all() and not scratch[0][:6].eq(7).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [Positions(8192, 1024), Positions(100, 37)], ids=str)
@pytest.mark.parametrize(("length", "count"), [(1, 1), (129, 1), (190, 5), (131, 16)])
def test_decode_and_few_rows_read_int8(
    length: int, count: int, positions: Positions, dtype: torch.dtype, kernel_device: str,
) -> None:
    """As the specification attends to the numbers that are stored."""
    gain = int8_kv.key_gains(torch.tensor([[1.0, 80.0] + [1.0] * 14, [1.0] * 16]))
    case = as_int8(oracle.make_case(length, positions, num_heads=14, num_kv_heads=2, dtype=dtype,
                                    device=kernel_device), gain)
    args = (case.q[length - count :], case.cache, case.block_table, length - count, case.rotary,
            case.scale)
    assert decode.takes_rows(args[0], case.cache, case.rotary)
    out, lse = decode.prefill_attention(*args)
    expected, expected_lse = reference.prefill_attention(*args)
    assert_close(out, expected, "out")
    assert_close(lse, expected_lse, "lse", dtype)


def test_eager_reads_int8() -> None:
    case = as_int8(oracle.make_case(190, Positions(100, 37), num_heads=4, num_kv_heads=2))
    args = (case.q[70:], case.cache, case.block_table, 70, case.rotary, case.scale)
    expected = reference.prefill_attention(*args)
    for impl in (eager_dense, ops):
        assert_close(impl.prefill_attention(*args)[0], expected[0])
    readable, table = ops.readable_kv(
        case.q[70:], case.cache, case.block_table, 190, case.rotary)
    assert readable.k_scale is None and readable.k.dtype == torch.float32
    out, _ = ops.prefill_attention(case.q[70:], readable, table, 70, case.rotary, case.scale)
    assert_close(out, expected[0])
    plain = oracle.make_case(20, Positions(100, 37))
    assert ops.readable_kv(plain.q, plain.cache, plain.block_table, 20, plain.rotary) == (
        plain.cache, plain.block_table)
    assert math.isnan(float(case.cache.k_scale[case.block_table[-1], 0, -1]))
