"""The scouts' pass over all keys on Hopper, in Gluon: `scout_kernels.score_scouts`.

Blocks of 64 scouts stand where `hopper_tiles` has its probe rows, and are multiplied with key tiles
in the same way. Of each product a consumer takes the row's maximum and nothing else.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longspan.ops.select import hopper_tiles
from longspan.ops.select.hopper_tiles import (
    HALF,
    STAGES,
    TILE,
    _barriers,
    _folded_max,
    _span,
)
from longspan.ops.tiles.hopper import key_tiles, query_halves

supports = hopper_tiles.supports
num_parts = hopper_tiles.num_parts


def score(
    queries: Tensor, k: Tensor, block_table: Tensor, is_column: Tensor, missed: Tensor,
    heads: tuple[int, int], zones: tuple[int, int, int, int],
) -> None:
    """Score all scouts of some KV heads over all key tiles, n of P keys. Logits are of base 2.

    Args:
        queries: [zones, H, RP, D] rotated.
        is_column: [heads here, (n + 1) * P] int8.
        missed: [heads here, n, RP] fp32: the largest logit of a tile without columns; anything in
            tiles that no scout of the row's query tile may list, its own one and later ones.
        heads: the first KV head here, and how many.
        zones: how many, all key tiles, where the inter zone ends, where the succ zone does.
    """
    _, num_heads, padded_rows, _ = queries.shape
    rows_here = num_heads // k.shape[2] * padded_rows
    groups, at_once = hopper_tiles.block_groups(rows_here)
    _scout_kernel[(num_parts(queries, k, heads[1]), groups, heads[1])](
        query_halves(queries), key_tiles(k), block_table, is_column, missed, heads[0],
        num_heads * padded_rows, *zones, rows_here, padded_rows.bit_length() - 1, BLOCKS=at_once,
        num_warps=4)


@gluon.jit
def _scout_producer(
    q_desc, k_desc, table, is_column, q_smem, k_smem, bias_smem, q_full, q_empty, k_full, k_empty,
    q_row, zone_rows, column, first_row, rows_here, num_zones, num_tiles, inter_end, succ_end,
    rp_bits, BLOCKS: gl.constexpr,
):
    """Load for each zone the blocks of scouts, and the zone's key tiles, with a bias for each block
    of -inf where the key is one of its head's columns. RP is 1 << ``rp_bits``: a kernel is not
    compiled anew for another number of scouts."""
    LANES: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    lanes = gl.arange(0, TILE, layout=LANES)
    i = num_zones * 0
    for zone in range(num_zones):
        first, count = _span(zone, 0, num_tiles, inter_end, succ_end)
        mbarrier.wait(q_empty, (zone & 1) ^ 1)
        mbarrier.expect(q_full, BLOCKS * HALF * TILE * 2)
        for block in gl.static_range(BLOCKS):
            tma.async_copy_global_to_shared(
                q_desc, [zone * zone_rows + q_row + block * HALF, 0], q_full, q_smem.index(block))
        for n in range(count):
            tile = first + n * gl.num_programs(0)
            row = gl.load(table + tile).to(gl.int32) * TILE
            taken: gl.tuple = ()  # all loads before the first wait: one latency, not one a block
            for block in gl.static_range(BLOCKS):
                head = gl.minimum(first_row + block * HALF, rows_here - 1) >> rp_bits
                place = (head.to(gl.int64) * (num_tiles + 1) + tile) * TILE
                taken = taken + (gl.load(is_column + place + lanes),)
            slot = i % STAGES
            mbarrier.wait(k_empty.index(slot), (i // STAGES & 1) ^ 1)
            full = k_full.index(slot)
            mbarrier.expect(full, TILE * TILE * 2)
            tma.async_copy_global_to_shared(k_desc, [row, column], full, k_smem.index(slot))
            for block in gl.static_range(BLOCKS):
                bias_smem.index(slot * BLOCKS + block).store(
                    gl.where(taken[block] > 0, float("-inf"), 0.0))
            mbarrier.arrive(full, count=1)
            i += 1


@gluon.jit
def _scout_consumer(
    missed, q_smem, k_smem, bias_smem, q_full, q_empty, k_full, k_empty, first_row, rows_here,
    num_zones, num_tiles, inter_end, succ_end, rp_bits, FIRST: gl.constexpr, STOP: gl.constexpr,
    BLOCKS: gl.constexpr,
):
    """Score the blocks [FIRST, STOP) over every tile.

    No causal mask: what it would hide, the tile that a scout stands in and later ones, is never
    listed.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    lane = gl.arange(0, HALF, layout=ROWS)
    zeros = gl.zeros([HALF, TILE], gl.float32, SCORES)
    i = num_zones * 0
    for zone in range(num_zones):
        first, count = _span(zone, 0, num_tiles, inter_end, succ_end)
        mbarrier.wait(q_full, zone & 1)
        for n in range(count):
            tile = first + n * gl.num_programs(0)
            slot = i % STAGES
            mbarrier.wait(k_full.index(slot), i // STAGES & 1)
            keys = k_smem.index(slot).permute((1, 0))
            s = warpgroup_mma(
                q_smem.index(FIRST), keys, zeros, use_acc=False, is_async=True)
            for g in gl.static_range(FIRST, STOP):
                if g + 1 < STOP:
                    following = warpgroup_mma(
                        q_smem.index(g + 1), keys, zeros, use_acc=False, is_async=True)
                    scores = warpgroup_mma_wait(1, deps=[s])
                    s = following
                else:
                    scores = warpgroup_mma_wait(0, deps=[s])
                # Were products started from the bias, ptxas would have them wait for one another.
                bias = bias_smem.index(slot * BLOCKS + g).load(gl.SliceLayout(0, SCORES))
                scores = scores + bias[None, :]
                if g + 1 == STOP:
                    mbarrier.arrive(k_empty.index(slot), count=1)
                row = first_row + g * HALF + lane
                head_row = (first_row + g * HALF) >> rp_bits
                top = gl.convert_layout(gl.max(_folded_max(scores), 1), ROWS)
                target = missed + ((head_row.to(gl.int64) * num_tiles + tile) << rp_bits)
                gl.store(target + (row & ((1 << rp_bits) - 1)), top, row < rows_here)
            i += 1
        mbarrier.arrive(q_empty, count=1)


@gluon.jit(do_not_specialize=[
    "first_kv_head", "zone_rows", "num_zones", "num_tiles", "inter_end", "succ_end", "rows_here",
    "rp_bits"])
def _scout_kernel(
    q_desc, k_desc, table, is_column, missed, first_kv_head, zone_rows, num_zones, num_tiles,
    inter_end, succ_end, rows_here, rp_bits, BLOCKS: gl.constexpr,
):
    """See `score`. Grid (programs along the keys, groups of blocks, KV heads here)."""
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [BLOCKS, HALF, TILE], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE, TILE], k_desc.layout)
    bias_smem = gl.allocate_shared_memory(
        gl.float32, [STAGES * BLOCKS, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full, q_empty, k_full, k_empty = _barriers(2)  # a tile is its keys and their biases
    kv = gl.program_id(2)
    first_row = gl.program_id(1) * BLOCKS * HALF
    heads = rows_here >> rp_bits  # of one KV head
    is_column += kv.to(gl.int64) * heads * (num_tiles + 1) * TILE
    missed += kv.to(gl.int64) * heads * num_tiles << rp_bits
    gl.warp_specialize([
        (_scout_consumer, (
            missed, q_smem, k_smem, bias_smem, q_full, q_empty, k_full, k_empty, first_row,
            rows_here, num_zones, num_tiles, inter_end, succ_end, rp_bits, gl.constexpr(0),
            gl.constexpr((BLOCKS + 1) // 2), gl.constexpr(BLOCKS))),
        (_scout_consumer, (
            missed, q_smem, k_smem, bias_smem, q_full, q_empty, k_full, k_empty, first_row,
            rows_here, num_zones, num_tiles, inter_end, succ_end, rp_bits,
            gl.constexpr((BLOCKS + 1) // 2), gl.constexpr(BLOCKS), gl.constexpr(BLOCKS))),
        (_scout_producer, (
            q_desc, k_desc, table, is_column, q_smem, k_smem, bias_smem, q_full, q_empty, k_full,
            k_empty, (first_kv_head + kv) * rows_here + first_row, zone_rows,
            (first_kv_head + kv) * TILE, first_row, rows_here, num_zones, num_tiles, inter_end,
            succ_end, rp_bits, gl.constexpr(BLOCKS))),
    ], [4, 1], [232, 40])
