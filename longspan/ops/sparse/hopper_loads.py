"""What the producer of Hopper's vertical-slash kernel copies: whole tiles, columns, means.

`load_whole` and `load_biased` load some steps of a query tile and return the number of the next
one. Biases are written beside the tile: -inf hides what the query tile sees whole.
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
        mbarrier.wait(k_empty.index(slot), parity(i, STAGES) ^ 1)
        load_tile(k_desc, block * TILE, column, k_full.index(slot), k_smem.index(slot))
        mbarrier.arrive(k_full.index(slot), count=1)  # stands for the bias, which these have not
        mbarrier.wait(v_empty.index(slot), parity(i, STAGES) ^ 1)
        load_tile(v_desc, block * TILE, column, v_full.index(slot), v_smem.index(slot))
        block = following
        i += 1
    return i


@gluon.jit
def load_biased(
    i, k_desc, v_desc, facts, row, count, column, k_smem, v_smem, bias_smem, flag_smem, k_full,
    k_empty, v_full, v_empty, BIAS_OF: gl.constexpr, LISTED: gl.constexpr,
):
    """Load steps from i on: ``count`` keys from ``row`` on, each with a bias. Returns the next
    step.

    BIAS_OF: `column_bias`, `near_mean_bias` or `far_mean_bias`; facts: what that one needs.
    """
    LANES: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    lanes = gl.arange(0, TILE, layout=LANES)
    for part in range(cover(count)):
        slot = i % STAGES
        first = row + part * TILE
        mbarrier.wait(k_empty.index(slot), parity(i, STAGES) ^ 1)
        load_tile(k_desc, first, column, k_full.index(slot), k_smem.index(slot))
        place = part * TILE + lanes
        bias, has_bias = BIAS_OF(facts, first + lanes, place, place < count, LISTED)
        bias_smem.index(slot).store(bias)
        # whether the slot's keys have biases
        flag_smem.index(slot).store(
            gl.full([1], has_bias, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
        mbarrier.arrive(k_full.index(slot), count=1)
        mbarrier.wait(v_empty.index(slot), parity(i, STAGES) ^ 1)
        load_tile(v_desc, first, column, v_full.index(slot), v_smem.index(slot))
        i += 1
    return i


@gluon.jit
def column_bias(facts, row, place, exists, LISTED: gl.constexpr):
    """Return -inf for gathered columns whose tile this query tile sees whole, and whether there are
    any. facts: flags, bits and number of the query tile, the key tile of each column."""
    flags, bits, tile, column_tile = facts
    key_tile = gl.load(column_tile + row, exists, other=0)
    hidden = _hidden(flags, bits, tile, key_tile, exists, LISTED)
    return gl.where(hidden == 0, 0.0, float("-inf")), gl.max(hidden, 0)


@gluon.jit
def near_mean_bias(facts, row, place, exists, LISTED: gl.constexpr):
    """Return the weights of means of single tiles, -inf where this query tile sees the tile whole.
    facts: flags, bits and number of the query tile, the weight of each mean, the first one's tile.
    """
    flags, bits, tile, weights, first_tile = facts
    hidden = _hidden(flags, bits, tile, first_tile + place, exists, LISTED)
    weight = gl.load(weights + row, exists, other=0.0)
    return gl.where(hidden == 0, weight, float("-inf")), 1


@gluon.jit
def far_mean_bias(facts, row, place, exists, LISTED: gl.constexpr):
    """Return the weights of means of groups of tiles, by how many of those this query tile does not
    see whole. facts: number of windows before each tile gap, bits and number of the query tile, the
    weight of each mean, the first one's group."""
    window_rank, bits, tile, weights, first_group = facts
    far_tile = (first_group + place) * COARSE_TILES
    gap = tile - far_tile
    seen = (gl.load(window_rank + gap + 1, exists, other=COARSE_TILES)
            - gl.load(window_rank + gap + 1 - COARSE_TILES, exists, other=0))
    if LISTED:
        word = gl.load(bits + far_tile // 32, exists, other=0) >> (far_tile % 32)
        for bit in gl.static_range(COARSE_TILES):
            seen += (word >> bit) & 1
    free = gl.where(exists, COARSE_TILES - seen, 0).to(gl.float32)
    return gl.load(weights + row, exists, other=0.0) + gl.log2(free), 1


@gluon.jit
def _hidden(flags, bits, tile, key_tile, exists, LISTED: gl.constexpr):
    """Return flags, not 0 where the query tile sees the key tile whole, as a window or listed, or
    there is none."""
    hidden = gl.load(flags + tile - key_tile, exists, other=1).to(gl.int32)
    if LISTED:
        word = gl.load(bits + key_tile // 32, exists, other=0)
        hidden = hidden | ((word >> (key_tile % 32)) & 1)
    return hidden
