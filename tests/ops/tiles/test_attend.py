"""The fused primitives: plain and biased attention with LSE, and the merge."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longspan.ops.tiles.attend import attend, attend_biased, merge, rotated_queries
from tests.conftest import assert_close
from tests.ops import oracle
from tests.ops.oracle import Positions

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


def expected(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | float = 0.0
             ) -> tuple[Tensor, Tensor]:
    """Softmax attention in fp64; a row without keys gives out 0, lse -inf."""
    logits = q.double() @ k.double().transpose(-1, -2) * scale + bias
    lse = logits.logsumexp(-1)
    return (logits - lse.clamp(min=-1e300)[..., None]).exp() @ v.double(), lse


def inputs(batch: int, heads: int, num_queries: int, num_keys: int, dtype: torch.dtype,
           device: str, head_dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, heads, num_queries, head_dim, dtype=dtype)
    k, v = torch.randn(2, batch, heads, num_keys, head_dim, dtype=dtype)
    return q.to(device), k.to(device), v.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1), (1, 4097), (63, 111), (130, 1), (512, 777)],
                         ids=lambda sizes: f"T{sizes[0]}-S{sizes[1]}")
def test_attend(sizes: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    q, k, v = inputs(1, 3, *sizes, dtype, device)
    out, lse = attend(q, k, v, 0.2)
    expected_out, expected_lse = expected(q, k, v, 0.2)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 111, 600], ids=lambda n: f"T{n}")
def test_attend_causal(size: int, dtype: torch.dtype, device: str) -> None:
    q, k, v = inputs(2, 2, size, size, dtype, device)
    out, lse = attend(q, k, v, 0.2, causal=True)
    future = torch.full((size, size), -math.inf, device=device).triu(1)
    expected_out, expected_lse = expected(q, k, v, 0.2, future)
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse", dtype)


def test_attend_reads_overlapping_views(device: str) -> None:
    """Keys may be an as_strided view whose batch entries overlap: the local band."""
    q, k, v = inputs(5, 1, 8, 8, torch.float32, device)
    flat_k, flat_v = (x.reshape(40, 32) for x in (k, v))
    k, v = (x.as_strided((4, 1, 16, 32), (8 * 32, 0, 32, 1)) for x in (flat_k, flat_v))
    out, _ = attend(q[1:], k, v, 0.2)
    assert_close(out, expected(q[1:], k.clone(), v.clone(), 0.2)[0], "out")


@pytest.mark.parametrize("shared", [False, True], ids=["own-keys", "shared-keys"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_biased(dtype: torch.dtype, shared: bool, device: str) -> None:
    """Dropped keys, logarithms of counts, and rows that lose every key."""
    q, k, v = inputs(6, 1, 16, 63, dtype, device)
    k, v = (x[:1] if shared else x for x in (k, v))
    bias = torch.randint(0, 17, (6, 1, 1, 63)).float().log()
    bias[2], bias[3, ..., 1:] = -math.inf, -math.inf
    bias = bias.to(device)
    out, lse = attend_biased(q, k, v, 0.2, bias)
    expected_out, expected_lse = expected(q, k, v, 0.2, bias.double())
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse", dtype)
    assert (out[2] == 0).all() and (lse[2] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [[0, 111], [0, 1, 111], [0, 30, 31, 90, 111]],
                         ids=lambda cuts: f"{len(cuts) - 1}-parts")
def test_merge_of_disjoint_keys_equals_one_softmax(
    cuts: list[int], dtype: torch.dtype, device: str
) -> None:
    q, k, v = inputs(1, 2, 63, 111, dtype, device)
    parts = [attend(q, k[:, :, a:b], v[:, :, a:b], 0.2)
             for a, b in zip(cuts, cuts[1:], strict=False)]
    out, lse = merge(parts)
    expected_out, expected_lse = expected(q, k, v, 0.2)
    assert out.dtype == dtype
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse", dtype)


def test_merge_with_empty_and_extreme_parts(device: str) -> None:
    """LSE -inf has no weight, whatever its place; LSEs thousands apart do not overflow."""
    value = torch.randn(1, 1, 4, 8, device=device)
    none = torch.zeros_like(value), torch.full((1, 1, 4), -math.inf, device=device)
    low = value, torch.full((1, 1, 4), -5000.0, device=device)
    high = 2 * value, torch.full((1, 1, 4), 5000.0, device=device)
    for parts in ([none, low], [low, none], [none, none, low, none]):
        out, lse = merge(parts)
        assert torch.equal(out, value) and torch.equal(lse, low[1])
    out, lse = merge([low, high, none])
    assert torch.equal(out, 2 * value) and torch.equal(lse, high[1])
    out, lse = merge([none, none])
    assert (out == 0).all() and (lse == -math.inf).all()


def test_merge_keeps_nan_visible(device: str) -> None:
    """A NaN of a part must reach the result: it is a bug somewhere, not an empty part."""
    value, lse = torch.randn(1, 1, 4, 8, device=device), torch.zeros(1, 1, 4, device=device)
    broken = value.clone()
    broken[0, 0, 2, 3] = math.nan
    out, _ = merge([(value, lse), (broken, lse)])
    assert out[0, 0, 2, 3].isnan()
    _, merged = merge([(value, lse), (value, lse * math.nan)])
    assert merged.isnan().all()


@pytest.mark.parametrize("zone", [0, 1, 2])
@pytest.mark.parametrize("positions", [Positions(262_144, 8_192), Positions(131_072, 4_096)],
                         ids=["253952", "126976"])
def test_queries_behind_released_strides(positions: Positions, zone: int, device: str) -> None:
    """Rows on both sides of the second border, rotated for one key of each zone that they have,
    and where the succ zone reaches the clamp."""
    rotary = oracle.moved(oracle.tables(32, positions, 1 << 20), device)
    for start in (2 * positions.stride - 3, 2 * positions.stride + positions.chunk_size // 32 - 3):
        q = torch.randn(6, 2, 32, device=device)
        found = rotated_queries(q, start, zone, rotary)
        rows = range(start, start + 6)
        turns = [oracle.rotated_query(row, (row // positions.stride - zone) * positions.stride,
                                      positions)
                 for row in rows if row // positions.stride >= zone]
        angles = torch.outer(torch.tensor(turns).double(), rotary.inv_freq.double().cpu())
        assert_close(found[-len(turns):], oracle.rotate_pair(q[-len(turns):].cpu(), angles))
