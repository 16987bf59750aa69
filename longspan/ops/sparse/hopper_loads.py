"""What the producer of Hopper's vertical-slash kernel copies: whole tiles, columns, means.

Each function loads some steps of a query tile and returns the number of the next one. Where keys
have biases, it writes those beside the tile: -inf hides what the query tile sees whole.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from longspan.ops.geometry import COARSE
from longspan.ops.tiles.hopper import STAGES, TILE, load_tile, parity

COARSE_TILES = gl.constexpr(COARSE)


@gluon.jit
def cover(keys):
    """Return how many tiles hold so many keys."""
    return (keys + TILE - 1) // TILE


@gluon.jit
def load_whole(
    i, k_desc, v_desc, block_table, tiles, base, sign, first, stop, column, k_smem, v_smem, k_full,
    k_empty, v_full, v_empty,
):
    """Load steps from i on: whole KV blocks, key tiles ``base`` + ``sign`` times the entries
    [first, stop) of ``tiles``. Returns the next step."""
    entry = gl.load(tiles + first, first < stop, other=0)
    block = gl.load(block_table + base + sign * entry).to(gl.int32)
    for at in range(first, stop):
        entry = gl.load(tiles + gl.minimum(at + 1, stop - 1))
        following = gl.load(block_table + base + sign * entry).to(gl.int32)
        slot = i % STAGES
        mbarrier.wait(k_empty.index(slot), parity(i) ^ 1)
        load_tile(k_desc, block * TILE, column, k_full.index(slot), k_smem.index(slot))
        mbarrier.arrive(k_full.index(slot), count=1)  # stands for the bias, which these have not
        mbarrier.wait(v_empty.index(slot), parity(i) ^ 1)
        load_tile(v_desc, block * TILE, column, v_full.index(slot), v_smem.index(slot))
        block = following
        i += 1
    return i


@gluon.jit
def _hidden(flags, bits, tile, key_tile, exists, LISTED: gl.constexpr):
    """Return flags, not 0 where the query tile sees the key tile whole, as a window or listed, or
    there is none."""
    hidden = gl.load(flags + tile - key_tile, exists, other=1).to(gl.int32)
    if LISTED:
        word = gl.load(bits + key_tile // 32, exists, other=0)
        hidden = hidden | ((word >> (key_tile % 32)) & 1)
    return hidden


@gluon.jit
def _set_flag(flag, value):
    """Set whether the slot's keys have biases."""
    flag.store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def load_columns(
    i, k_desc, v_desc, column_tile, flags, bits, tile, row, count, k_smem, v_smem, bias_smem,
    flag_smem, k_full, k_empty, v_full, v_empty, LISTED: gl.constexpr,
):
    """Load steps from i on: ``count`` gathered columns from ``row`` on, hidden where this query
    tile sees their tile whole. Returns the next step."""
    LANES: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    lanes = gl.arange(0, TILE, layout=LANES)
    for part in range(cover(count)):
        slot = i % STAGES
        first = row + part * TILE
        mbarrier.wait(k_empty.index(slot), parity(i) ^ 1)
        load_tile(k_desc, first, 0, k_full.index(slot), k_smem.index(slot))
        exists = part * TILE + lanes < count
        key_tile = gl.load(column_tile + first + lanes, exists, other=0)
        hidden = _hidden(flags, bits, tile, key_tile, exists, LISTED)
        bias_smem.index(slot).store(gl.where(hidden == 0, 0.0, float("-inf")))
        _set_flag(flag_smem.index(slot), gl.max(hidden, 0))
        mbarrier.arrive(k_full.index(slot), count=1)
        mbarrier.wait(v_empty.index(slot), parity(i) ^ 1)
        load_tile(v_desc, first, 0, v_full.index(slot), v_smem.index(slot))
        i += 1
    return i


@gluon.jit
def load_means(
    i, k_desc, v_desc, mean_bias, flags, bits, tile, row, first_tile, count, column, k_smem, v_smem,
    bias_smem, flag_smem, k_full, k_empty, v_full, v_empty, LISTED: gl.constexpr,
):
    """Load steps from i on: means of the ``count`` tiles from ``first_tile`` on, which begin at
    ``row``, hidden where this query tile sees the tile whole. Returns the next step."""
    LANES: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    lanes = gl.arange(0, TILE, layout=LANES)
    for part in range(cover(count)):
        slot = i % STAGES
        first = row + part * TILE
        mbarrier.wait(k_empty.index(slot), parity(i) ^ 1)
        load_tile(k_desc, first, column, k_full.index(slot), k_smem.index(slot))
        exists = part * TILE + lanes < count
        key_tile = first_tile + part * TILE + lanes
        hidden = _hidden(flags, bits, tile, key_tile, exists, LISTED)
        weight = gl.load(mean_bias + first + lanes, exists, other=0.0)
        bias_smem.index(slot).store(gl.where(hidden == 0, weight, float("-inf")))
        _set_flag(flag_smem.index(slot), 1)
        mbarrier.arrive(k_full.index(slot), count=1)
        mbarrier.wait(v_empty.index(slot), parity(i) ^ 1)
        load_tile(v_desc, first, column, v_full.index(slot), v_smem.index(slot))
        i += 1
    return i


@gluon.jit
def load_far_means(
    i, k_desc, v_desc, mean_bias, window_rank, bits, tile, row, first_group, count, column, k_smem,
    v_smem, bias_smem, flag_smem, k_full, k_empty, v_full, v_empty, LISTED: gl.constexpr,
):
    """Load steps from i on: means of ``count`` groups of tiles from ``first_group`` on, which begin
    at ``row``, weighed by the tiles that this query tile does not see whole. Returns the next step.
    """
    LANES: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    lanes = gl.arange(0, TILE, layout=LANES)
    for part in range(cover(count)):
        slot = i % STAGES
        first = row + part * TILE
        mbarrier.wait(k_empty.index(slot), parity(i) ^ 1)
        load_tile(k_desc, first, column, k_full.index(slot), k_smem.index(slot))
        exists = part * TILE + lanes < count
        far_tile = (first_group + part * TILE + lanes) * COARSE_TILES
        gap = tile - far_tile
        seen = (gl.load(window_rank + gap + 1, exists, other=COARSE_TILES)
                - gl.load(window_rank + gap + 1 - COARSE_TILES, exists, other=0))
        if LISTED:
            word = gl.load(bits + far_tile // 32, exists, other=0) >> (far_tile % 32)
            for bit in gl.static_range(COARSE_TILES):
                seen += (word >> bit) & 1
        free = gl.where(exists, COARSE_TILES - seen, 0).to(gl.float32)
        weight = gl.load(mean_bias + first + lanes, exists, other=0.0)
        bias_smem.index(slot).store(weight + gl.log2(free))
        _set_flag(flag_smem.index(slot), 1)
        mbarrier.arrive(k_full.index(slot), count=1)
        mbarrier.wait(v_empty.index(slot), parity(i) ^ 1)
        load_tile(v_desc, first, column, v_full.index(slot), v_smem.index(slot))
        i += 1
    return i
