"""Pointwise work on CPUs against the specification."""

from __future__ import annotations

import pytest
import torch

from longspan import ops
from longspan.attention.cache import allocate_cache
from longspan.attention.rope import build_rotary
from longspan.ops import reference
from longspan.ops.tiles import few_calls
from longspan.ops.types import PagedKV, QueryRotary

BLOCK, HEADS, DIM = 16, 2, 8
assert_close = torch.testing.assert_close
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def rotary() -> QueryRotary:
    return build_rotary(head_dim=DIM, rope_theta=1e4, device="cpu", scaling=None,
                        max_model_len=64, dca=None)


@TYPES
@pytest.mark.parametrize("shape", [(1, 48), (5, 3, 48), (700, 48)], ids=str)
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Few rows go to NumPy, many to PyTorch; half of each row's neighbours are not its own."""
    x, weight = 30 * torch.randn(*shape[:-1], 96).to(dtype)[..., :48], torch.randn(48, dtype=dtype)
    assert_close(few_calls.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    ours, theirs = x.clone(), x.clone()
    found, _ = few_calls.add_rms_norm(x / 3, ours, weight, 1e-6)
    expected, _ = reference.add_rms_norm(x / 3, theirs, weight, 1e-6)
    assert_close(found, expected)
    assert torch.equal(ours, theirs)


@TYPES
def test_swiglu_leaves_what_it_reads(dtype: torch.dtype) -> None:
    gate_up = 9 * torch.randn(3, 64, dtype=dtype)
    before = gate_up.clone()
    assert torch.equal(few_calls.silu_mul(gate_up), reference.silu_mul(gate_up))
    assert torch.equal(gate_up, before)


def test_gradients_go_through() -> None:
    """NumPy and in-place work have none."""
    x, weight = torch.randn(2, 48, requires_grad=True), torch.ones(48)
    (ops.rms_norm(x, weight, 1e-6).square().sum() + ops.silu_mul(x).sum()).backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


@TYPES
def test_rotation_of_a_part_of_a_merged_projection(dtype: torch.dtype) -> None:
    tables = rotary()
    for rows in (torch.tensor([0, 63, 7, 7, 30]), torch.arange(3_000) % 64):
        merged = torch.randn(len(rows), 4 * HEADS, DIM, dtype=dtype)
        args = merged[:, HEADS : 2 * HEADS], tables.cos[rows], tables.sin[rows]
        assert_close(few_calls.rotate(*args), reference.rotate(*args))


def poisoned(dtype: torch.dtype, *, means: bool) -> PagedKV:
    cache = allocate_cache(num_blocks=4, block_size=BLOCK, num_kv_heads=HEADS, head_dim=DIM,
                           dtype=dtype, device="cpu", means=means)
    for part in cache:
        if part is not None:
            part.fill_(torch.nan)
    return cache


@TYPES
@pytest.mark.parametrize("slots", [[3], list(range(BLOCK, 3 * BLOCK)), [0, -1, 40]], ids=str)
def test_keys_and_values_go_where_they_belong(slots: list[int], dtype: torch.dtype) -> None:
    """One row, whole blocks with their means, and a row that is not stored."""
    filled = torch.tensor([2, 1] if len(slots) == 2 * BLOCK else [], dtype=torch.int64)
    k, v = torch.randn(2, len(slots), HEADS, DIM, dtype=dtype)
    args = k, v, torch.arange(len(slots)) + 20, torch.tensor(slots), filled, rotary()
    found, expected = poisoned(dtype, means=True), poisoned(dtype, means=True)
    ops.store_kv(found, *args)
    reference.store_kv(expected, *args)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_rotation_stays_on_its_device() -> None:
    """Decode without kernels rotates by it on any device."""
    x, tables = torch.randn(2, HEADS, DIM, device="meta"), torch.randn(2, DIM // 2, device="meta")
    assert few_calls.rotate(x, tables, tables).device.type == "meta"
