"""Decode on Hopper: one token of each of several sequences, or few of one, by int8 or bf16 keys.

What bounds it is reading keys and values once. Programs take equal shares of the key tiles of all
sequences, whatever their lengths are, which are read on the device: the grid depends on shapes only
(CUDA graphs), and one wave of programs ends together. Parts are merged by LSE. The kernel is
`hopper_decode_kernel`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longspan.ops.dense.hopper_decode_kernel import decode_kernel
from longspan.ops.tiles import hopper as hopper_tile
from longspan.ops.tiles.hopper import SHARED, TILE_LEN, key_tiles
from longspan.ops.tiles.items import merge_shares
from longspan.ops.tiles.splits import num_sms
from longspan.ops.types import KeySpans, PagedKV, QueryRotary

MIN_LANES, MAX_LANES = 8, 64
"""Columns of a product of tensor cores: query heads of a KV head, times rows."""
MAX_LAUNCHES = 2
"""More query tokens than fit that many launches are left to the prefill kernels."""
MIN_TILES = 2
"""Fewer key tiles than this are not worth a share of their own."""


class Launch(NamedTuple):
    """How a number of lanes is computed."""

    programs_per_sm: int
    stages: int
    """Key and value tiles in flight, 33 KiB each; of bf16 64."""
    registers: int
    """Average of all threads: the producer gives the consumers most of its own."""


LAUNCHES = {8: Launch(2, 3, 80), 16: Launch(2, 3, 80), 32: Launch(1, 5, 168),
            64: Launch(1, 5, 168)}
"""Int8 keys, by lanes, padded."""
BF16_LAUNCHES = {8: Launch(1, 3, 168), 16: Launch(1, 3, 168), 32: Launch(1, 3, 168),
                 64: Launch(1, 2, 168)}
"""bf16 keys."""

_SCALES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def supports(q: Tensor, cache: PagedKV, rotary: QueryRotary) -> bool:
    """Return whether these kernels compute a cache: int8 beside bf16, head dim and blocks of 128,
    DCA chunks of whole tiles. q: [T, H, D]."""
    sizes = cache.k.shape[1] == cache.k.shape[3] == TILE_LEN
    whole = rotary.stride % TILE_LEN == 0 or rotary.cos.shape[0] <= rotary.stride
    return (hopper_tile.is_hopper(q.device) and sizes and whole
            and q.dtype == cache.dtype == torch.bfloat16 and q.stride(2) == 1
            and q.shape[1] // cache.k.shape[2] <= MAX_LANES
            and all(part.is_contiguous() for part in cache.by_block().values()))


def takes_decode(
    q: Tensor, cache: PagedKV, rotary: QueryRotary, spans: KeySpans | None
) -> bool:
    """Return whether `decode_attention` is the fastest for a batch of single tokens."""
    return spans is None and cache.k_scale is not None and supports(q, cache, rotary)


def takes_rows(q: Tensor, cache: PagedKV, rotary: QueryRotary) -> bool:
    """Return whether `prefill_attention` computes these queries, few rows of one sequence.
    q: [T, H, D]."""
    most = MAX_LANES * cache.k.shape[2] // q.shape[1]
    return (0 < q.shape[0] <= MAX_LAUNCHES * most and min(q.shape[0], most) <= rotary.stride
            and supports(q, cache, rotary))


def decode_attention(
    q: Tensor, cache: PagedKV, block_tables: Tensor, context_lens: Tensor, rotary: QueryRotary,
    scales: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `reference.decode_attention`. Reads no device value on the host: graph capture is safe.

    A request of length 0 gives out 0 and lse -inf. Needs what `supports` says.
    """
    return attend(q, cache, block_tables, context_lens, rotary, scales, 1)


def prefill_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor, cached_len: int, rotary: QueryRotary,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `reference.prefill_attention`: few rows, as many as `takes_rows` says. No host sync."""
    most = MAX_LANES * cache.k.shape[2] // q.shape[1]
    scales = torch.full((1,), scale, dtype=torch.float32, device=q.device)
    parts, start = [], cached_len
    for rows in q.tensor_split(-(-q.shape[0] // most)):
        start += len(rows)
        lens = torch.full((1,), start, dtype=torch.int64, device=q.device)
        parts.append(attend(rows, cache, block_table[None], lens, rotary, scales, len(rows)))
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses)


def attend(
    q: Tensor, cache: PagedKV, block_tables: Tensor, context_lens: Tensor, rotary: QueryRotary,
    scales: Tensor, num_rows: int, launch: Launch | None = None, programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with the last ``num_rows`` tokens of each of B requests, which lie in two DCA chunks
    at most, in ``programs`` shares. q: [B * num_rows, H, D]; returns the same and
    [B * num_rows, H]."""
    num_heads, head_dim = q.shape[1:]
    batch, num_kv_heads = len(context_lens), cache.k.shape[2]
    assert block_tables.stride(1) == 1 and len(q) == batch * num_rows
    group = num_heads // num_kv_heads
    lanes = max(MIN_LANES, triton.next_power_of_2(group * num_rows))
    launch = launch or (BF16_LAUNCHES if cache.k_scale is None else LAUNCHES)[lanes]
    programs = programs or max(1, launch.programs_per_sm * num_sms(q.device) // num_kv_heads)
    shared = {"REQUESTS": triton.next_power_of_2(batch), "MIN_TILES": MIN_TILES}
    # heads of one row after those of another: for the merge they are all heads
    width = num_rows * num_heads
    num_parts = 2 * (programs + batch)
    parts = torch.empty(num_parts, width, head_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(num_parts, width, dtype=torch.float32, device=q.device)
    if cache.k_scale is not None and cache.v_scale is not None and cache.k_gain is not None:
        tiles = (_byte_pairs(cache.k), _byte_pairs(cache.v), _tile_scales(cache.k_scale),
                 _tile_scales(cache.v_scale), cache.k_gain)
    else:
        keys, values = key_tiles(cache.k), key_tiles(cache.v)
        tiles = (keys, values, keys, values, cache.k)  # the last three are not read
    decode_kernel[(num_kv_heads, programs)](
        *tiles, block_tables, context_lens, scales, q,
        rotary.cos, rotary.sin, parts, part_lse, q.stride(0), q.stride(1), block_tables.stride(0),
        batch, num_rows, num_heads, group, rotary.stride, -(-rotary.stride // TILE_LEN),
        rotary.clamp, rotary.cos.shape[0], LANES=lanes, STAGES=launch.stages,
        REGISTERS=(3 * launch.registers - 24) // 16 * 8, **shared, num_warps=4,
        maxnreg=launch.registers)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    merge_shares[(width, batch)](
        parts, part_lse, context_lens, out, lse, width, batch, programs, TILE=TILE_LEN,
        HEAD_DIM=head_dim, PARTS=2, ITEMS=128, **shared, num_warps=8)
    return out, lse


def _byte_pairs(x: Tensor) -> TensorDescriptor:
    """Describe tiles of 128 keys by the 64 pairs of one KV head. x: [N, P, K, D] int8."""
    flat = x.view(torch.int16).flatten(2).flatten(0, 1)
    return TensorDescriptor(
        flat, list(flat.shape), list(flat.stride()), [TILE_LEN, TILE_LEN // 2], SHARED)


def _tile_scales(scales: Tensor) -> TensorDescriptor:
    """Describe the scales of a tile. scales: [N, K, P] fp32."""
    flat = scales.flatten(0, 1)
    return TensorDescriptor(
        flat, list(flat.shape), list(flat.stride()), [1, TILE_LEN], _SCALES)
