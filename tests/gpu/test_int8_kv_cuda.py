"""Keys and values in int8, compiled: written, written out, decoded behind the released strides."""

from __future__ import annotations

import pytest
import torch

from longspan import ops
from longspan.attention.cache import allocate_cache
from longspan.ops import decode, int8_kv, reference
from longspan.ops.quant import triton_kv
from longspan.ops.types import PagedKV
from tests.conftest import assert_close
from tests.gpu.syncs import no_syncs
from tests.gpu.test_decode_cuda import RELEASED
from tests.gpu.test_prefill_cuda import BLOCK, DEVICE, Case, make_case

pytestmark = pytest.mark.gpu


def as_int8(case: Case, length: int) -> Case:
    """The same request in int8, written by the kernels; unturned, for its keys are rotated."""
    num_blocks, _, heads, dim = case.cache.k.shape
    gain = torch.ones(heads, dim, device=DEVICE)
    gain[0, [3, 3 + dim // 2]] = 16.0
    cache = allocate_cache(num_blocks=num_blocks, block_size=BLOCK, num_kv_heads=heads,
                           head_dim=dim, dtype=torch.bfloat16, device=DEVICE, means=True,
                           k_gain=gain)
    k, v = reference.gather_kv(case.cache, case.block_table, length)
    positions = torch.arange(length, device=DEVICE)
    slots = case.block_table[positions // BLOCK] * BLOCK + positions % BLOCK
    full = case.block_table[: length // BLOCK]
    still = case.rotary._replace(stride=1)  # position 0: not turned
    with no_syncs():
        triton_kv.store_kv(cache, k, v, positions, slots, full, still)
    return case._replace(cache=cache)


@pytest.mark.parametrize("count", [1, 2, 16])
@pytest.mark.parametrize(("chunk_size", "local_size"), RELEASED)
def test_read_behind_a_released_stride(count: int, chunk_size: int, local_size: int) -> None:
    stride = chunk_size - local_size
    for length in (stride + count // 2, 2 * stride + 5_001):
        case = as_int8(make_case(length, chunk_size=chunk_size, local_size=local_size, heads=14,
                                 kv_heads=2), length)
        args = case.args(length - count)
        assert decode.takes_rows(args[0], case.cache, case.rotary)
        with no_syncs():
            out, lse = ops.prefill_attention(*args)
        expected, expected_lse = reference.prefill_attention(*args)
        assert_close(out, expected, f"out, {length} tokens")
        assert_close(lse, expected_lse, "lse", torch.bfloat16)


def test_written_out_for_prefill() -> None:
    """Keys, values and means as the specification reads them; prefill over them."""
    length = 5_000
    case = as_int8(make_case(length, chunk_size=1_536, local_size=256), length)
    found, order = triton_kv.dense_kv(case.cache, case.block_table, length)
    wanted, _ = int8_kv.dense_kv(case.cache, case.block_table, length)
    for name, part in found.by_block().items():
        other = wanted.by_block()[name]
        if name in ("k", "v"):
            part, other = part.flatten(0, 1)[:length], other.flatten(0, 1)[:length]
        else:
            part, other = part[: length // BLOCK], other[: length // BLOCK]
        assert_close(part, other, name)
    args = case.args(length - 400)
    readable, table = ops.readable_kv(args[0], case.cache, case.block_table, length, case.rotary)
    assert readable.k_scale is None and isinstance(readable, PagedKV)
    out, _ = ops.prefill_attention(
        args[0], readable, table, length - 400, case.rotary, case.scale)
    assert_close(out, reference.prefill_attention(*args)[0])
