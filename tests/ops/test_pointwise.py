"""Fused pointwise kernels against the specification: odd sizes, strided rows, poisoned caches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longspan.ops import pointwise, reference
from longspan.ops.types import PagedKV, QueryRotary
from tests.conftest import assert_close
from tests.ops import oracle
from tests.ops.oracle import Positions

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 63), (111, 24), (2, 4097), (0, 8)], ids=str)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, kernel_device: str) -> None:
    x = 3 * torch.randn(shape, device=kernel_device).to(dtype)
    weight = torch.randn(shape[1], device=kernel_device).to(dtype)
    out = pointwise.rms_norm(x, weight, 1e-6)
    assert out.dtype == dtype
    if shape[0]:
        assert_close(out, reference.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("num_tokens", [1, 70])
def test_rms_norm_of_heads_in_a_merged_projection(num_tokens: int, kernel_device: str) -> None:
    merged = torch.randn(num_tokens, 9, 16, device=kernel_device)
    weight = torch.randn(16, device=kernel_device)
    heads = merged[:, 2:7]
    out = pointwise.rms_norm(heads, weight, 1e-6)
    assert out.is_contiguous()
    assert_close(out, reference.rms_norm(heads, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (129, 63)], ids=str)
def test_add_rms_norm_changes_the_residual_in_place(
    shape: tuple[int, int], dtype: torch.dtype, kernel_device: str
) -> None:
    x, residual = (torch.randn(shape, device=kernel_device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[1], device=kernel_device).to(dtype)
    expected, expected_residual = reference.add_rms_norm(x, residual.clone(), weight, 1e-6)
    out, same = pointwise.add_rms_norm(x, residual, weight, 1e-6)
    assert same is residual and torch.equal(residual, expected_residual)
    assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (111, 48), (2, 4098), (0, 8)], ids=str)
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype, kernel_device: str) -> None:
    gate_up = 4 * torch.randn(shape, device=kernel_device).to(dtype)
    out = pointwise.silu_mul(gate_up)
    assert out.dtype == dtype and out.shape == (shape[0], shape[1] // 2)
    if shape[0]:
        assert_close(out, reference.silu_mul(gate_up))


def test_silu_mul_of_extreme_gates(kernel_device: str) -> None:
    gate_up = torch.tensor([[-1e4, 1e4, -90.0, 2.0, 2.0, 2.0]], device=kernel_device)
    out = pointwise.silu_mul(gate_up)
    assert_close(out, torch.tensor([[0.0, 2e4, 0.0]], device=kernel_device))


def poisoned_cache(
    num_blocks: int, block_size: int, dtype: torch.dtype, device: str, *, means: bool = True
) -> PagedKV:
    shapes = [(num_blocks, block_size, 2, 16)] * 2 + [(num_blocks, 2, 16)] * 2 * means
    return PagedKV(*(torch.full(s, math.nan, dtype=dtype, device=device) for s in shapes))


def make_rotary(positions: Positions, device: str) -> QueryRotary:
    return oracle.moved(oracle.tables(16, positions, 10_000), device)


def same(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    """NaN in the same places, close elsewhere: what was not to be written was not."""
    if actual is None or expected is None:
        assert actual is expected
        return
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: other elements were written"
    assert_close(actual.nan_to_num(), expected.nan_to_num(), what)


@pytest.mark.parametrize("means", [True, False], ids=["means", "dense"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 63, 111, 129])
def test_store_kv(count: int, dtype: torch.dtype, means: bool, kernel_device: str) -> None:
    """A prefill chunk from the middle of a block, across DCA borders, out of a merged projection;
    one row is padding."""
    block_size, cached = 16, 37
    rotary = make_rotary(Positions(64, 16), kernel_device)
    caches = [poisoned_cache(16, block_size, dtype, kernel_device, means=means) for _ in range(2)]
    table = torch.randperm(16)
    position = torch.arange(cached + count)
    slots = table[position // block_size] * block_size + position % block_size
    merged = torch.randn(cached + count, 8, 16).to(kernel_device, dtype)
    for start, stop in ((0, cached), (cached, cached + count)):
        full = table[start // block_size : stop // block_size]
        filled = torch.cat((full, torch.tensor([-1])))
        part = slots[start:stop].clone()
        part[0] = -1 if start == 0 else part[0]
        for impl, cache in zip((pointwise, reference), caches, strict=True):
            impl.store_kv(
                cache, merged[start:stop, 4:6], merged[start:stop, 6:],
                position[start:stop].to(kernel_device), part.to(kernel_device),
                filled.to(kernel_device), rotary)
    for name, actual, expected in zip(PagedKV._fields, *caches, strict=True):
        same(actual, expected, name)
    if means:
        assert caches[0].k_mean is not None
        assert caches[0].k_mean[table[1]].isfinite().all()


@pytest.mark.parametrize(("chunk_size", "local_size"), [(262_144, 8_192), (131_072, 4_096)])
def test_store_kv_around_released_strides(
    chunk_size: int, local_size: int, kernel_device: str
) -> None:
    """The last keys of a DCA chunk and the first of the next, as the oracle turns them."""
    positions = Positions(chunk_size, local_size)
    rotary = oracle.tables(16, positions, chunk_size)
    stride = positions.stride
    position = torch.tensor([stride - 2, stride - 1, stride, 2 * stride - 1, 2 * stride,
                             1_000_000])
    k, v = torch.randn(2, len(position), 2, 16)
    expected = oracle.rotate_pair(
        k, torch.outer((position % stride).double(), rotary.inv_freq.double()))
    slots, none = torch.arange(len(position)) + 3, torch.tensor([-1])
    cache = poisoned_cache(1, 16, torch.float32, kernel_device, means=False)
    pointwise.store_kv(
        cache, k.to(kernel_device), v.to(kernel_device), position.to(kernel_device),
        slots.to(kernel_device), none.to(kernel_device), oracle.moved(rotary, kernel_device))
    assert_close(cache.k[0, 3:9], expected, "k")
    assert torch.equal(cache.v[0, 3:9].cpu(), v)
    assert cache.k[0, :3].isnan().all() and cache.k[0, 9:].isnan().all()


def test_store_kv_past_two_to_the_31_positions(kernel_device: str) -> None:
    """Positions are whole numbers of 64 bits; only their remainder picks the rotation."""
    rotary = make_rotary(Positions(64, 16), kernel_device)
    caches = [poisoned_cache(2, 16, torch.float32, kernel_device) for _ in range(2)]
    k, v = torch.randn(2, 1, 2, 16, device=kernel_device)
    rows = (torch.tensor([2**33 + 7]), torch.tensor([3]), torch.tensor([-1]))
    for impl, cache in zip((pointwise, reference), caches, strict=True):
        impl.store_kv(cache, k, v, *(x.to(kernel_device) for x in rows), rotary)
    same(caches[0].k, caches[1].k, "k")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel_device", ["cuda"], indirect=True)
def test_store_kv_past_two_to_the_31_elements(kernel_device: str) -> None:
    num_blocks, block_size = 2**31 // (128 * 2 * 16) + 3, 128
    cache = PagedKV(*(torch.zeros(num_blocks, block_size, 2, 16, dtype=torch.bfloat16,
                                  device=kernel_device) for _ in range(2)))
    rotary = make_rotary(Positions(64, 16), kernel_device)
    k, v = torch.randn(2, 1, 2, 16, device=kernel_device).bfloat16()
    slot = num_blocks * block_size - 1
    zero, last = (torch.tensor([x], device=kernel_device) for x in (0, slot))
    pointwise.store_kv(cache, k, v, zero, last, zero - 1, rotary)
    assert torch.equal(cache.k.flatten(0, 1)[slot], k[0])  # position 0: not turned
    assert int((cache.k != 0).any(-1).any(-1).sum()) == 1
