"""The eager attention paths on a CUDA GPU against the fp32 specification."""

from __future__ import annotations

import random

import pytest
import torch

from longspan.attention.rope import build_rotary
from longspan.config import DcaConfig
from longspan.ops import reference
from longspan.ops.dense import eager as eager_dense
from longspan.ops.select.eager import select_vertical_slash
from longspan.ops.sparse import eager as eager_sparse
from longspan.ops.types import Budget, PagedKV, QueryRotary
from tests.conftest import write_rotated

pytestmark = pytest.mark.gpu

BLOCK = 128
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
DEVICE = "cuda"


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS error over RMS reference; NaN anywhere is an error."""
    assert not torch.isnan(out).any()
    return float((out.float() - expected.float()).norm() / expected.float().norm())


def make_case(
    seed: int, num_heads: int, num_kv_heads: int, context_len: int, dtype: torch.dtype
) -> tuple[torch.Tensor, PagedKV, torch.Tensor]:
    """Queries for the whole context, a filled cache (NaN elsewhere), and a shuffled block table."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks, head_dim = -(-context_len // BLOCK), 128
    shape = (num_blocks + 3, BLOCK, num_kv_heads, head_dim)
    poison = [torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
    means = [torch.full((shape[0], *shape[2:]), float("nan"), dtype=dtype, device=DEVICE)
             for _ in range(2)]
    cache = PagedKV(*poison, *means)
    table = torch.randperm(num_blocks + 3, generator=generator)[:num_blocks].to(DEVICE)
    k, v, q = (torch.randn(context_len, n, head_dim, generator=generator).to(DEVICE, dtype)
               for n in (num_kv_heads, num_kv_heads, num_heads))
    positions = torch.arange(context_len, device=DEVICE)
    write_rotated(cache, k, v, table[positions // BLOCK] * BLOCK + positions % BLOCK)
    return q, cache, table


def make_rotary(chunk_size: int, local_size: int) -> QueryRotary:
    """Rotations for a DCA chunk of ``chunk_size - local_size`` tokens."""
    return build_rotary(
        head_dim=128, rope_theta=1e6, max_model_len=8192, device=DEVICE,
        dca=DcaConfig(chunk_size=chunk_size, local_size=local_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(28, 4), (4, 2), (5, 1)])
@pytest.mark.parametrize(("chunk_size", "local_size"), [(8192, 1024), (1024, 256)])
@pytest.mark.parametrize(
    ("cached_len", "query_len"), [(0, 63), (111, 900), (2047, 1), (1000, 1049)])
def test_dense_prefill_equals_reference(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, chunk_size: int, local_size: int,
    cached_len: int, query_len: int,
) -> None:
    q, cache, table = make_case(0, num_heads, num_kv_heads, cached_len + query_len, dtype)
    args = (q[cached_len:], cache, table, cached_len, make_rotary(chunk_size, local_size), 0.09)
    out, lse = eager_dense.prefill_attention(*args)
    expected, expected_lse = reference.prefill_attention(*args)
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert relative_error(lse, expected_lse) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_equals_reference(dtype: torch.dtype) -> None:
    q, cache, table = make_case(1, 28, 4, 2900, dtype)
    lens = torch.tensor([2900, 1, 777, 1024], device=DEVICE)
    args = (q[:4], cache, table.expand(4, -1), lens, make_rotary(1024, 256),
            torch.tensor([0.09, 0.1, 0.08, 0.09], device=DEVICE))
    out, lse = eager_dense.decode_attention(*args)
    expected, expected_lse = reference.decode_attention(*args)
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert relative_error(lse, expected_lse) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["tile", "paper"])
@pytest.mark.parametrize("chunk_size", [8192, 1280])
@pytest.mark.parametrize("seed", range(3))
def test_sparse_prefill_equals_reference(
    dtype: torch.dtype, mode: str, chunk_size: int, seed: int
) -> None:
    generator = random.Random(seed)
    num_heads, num_kv_heads = generator.choice([(7, 1), (4, 2)])
    num_tiles = generator.randint(4, 24)
    context_len = num_tiles * BLOCK
    rotary = make_rotary(chunk_size, 256)
    first = context_len - generator.randint(1, min(num_tiles, 6)) * BLOCK
    first = max(first, (context_len - 1) // rotary.stride * rotary.stride)
    q, cache, table = make_case(seed, num_heads, num_kv_heads, context_len, dtype)
    budget = Budget(
        vertical=tuple(generator.randint(5, 300) for _ in range(num_heads)),
        slash=tuple(generator.randint(1, 900) for _ in range(num_heads)),
        mode=mode, probe_last=64, probe_strided=64, sink=4, local=100)
    args = (q[first:], cache, table, first, rotary, 0.3)
    selection = select_vertical_slash(*args, budget)
    correction = mode == "tile"
    out, lse, kept = eager_sparse.sparse_prefill_attention(*args, selection, correction)
    expected, expected_lse, expected_kept = reference.sparse_prefill_attention(
        *args, selection, correction)
    assert kept == expected_kept
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert relative_error(lse, expected_lse) < TOLERANCE[dtype]
