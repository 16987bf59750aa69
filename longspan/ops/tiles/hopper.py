"""What both Hopper prefill kernels are made of: copies of tiles, and one step of attention.

One program computes 128 query rows of one head in three partitions of its warps: two consumers of
64 rows each and a producer that copies key and value tiles by TMA, two tiles ahead. A KV block is a
tile, so a tile is one copy through the block table. In every step a consumer starts the scores of
a tile, then the values of the tile before it, and computes the softmax of the one while the tensor
cores are busy with the other (as FlashAttention-3 does, arXiv 2407.08608).

All DCA zones share one online softmax: the query's rotations for the three zones lie side by side
in shared memory, and a step takes the one of its key tile's zone. Keys are walked from the query's
own tile backwards, so the causal mask belongs to the first step alone, and every row has a finite
maximum from then on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longspan.ops.tiles import splits
from longspan.ops.types import PagedKV, QueryRotary

TILE_LEN = 128
SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

TILE = gl.constexpr(128)
HALF = gl.constexpr(64)  # query rows of one consumer
STAGES = gl.constexpr(2)
ZONES = gl.constexpr(3)
_LN_2 = gl.constexpr(0.6931471805599453)


def is_hopper(device: torch.device) -> bool:
    """Return whether tensors of ``device`` are on a Hopper GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def supports(q: Tensor, cache: PagedKV, rotary: QueryRotary, context_len: int) -> bool:
    """Return whether these kernels can compute such a call: what the portable ones can, on Hopper,
    with head dim and tiles of 128."""
    return (is_hopper(q.device) and q.shape[2] == TILE_LEN == cache.k.shape[1]
            and splits.supports(q, cache, rotary, context_len))


def key_tiles(x: Tensor) -> TensorDescriptor:
    """Describe tiles of 128 keys by one KV head's 128 dims. x: [.., K, D] or [rows, K * D],
    contiguous but for the distance of rows."""
    flat = x.flatten(-2) if x.dim() > 2 else x
    flat = flat.flatten(0, -2)
    return TensorDescriptor(
        flat, list(flat.shape), list(flat.stride()), [TILE_LEN, TILE_LEN], SHARED)


def query_halves(variants: Tensor) -> TensorDescriptor:
    """Describe half tiles of queries. variants: [Z, H, n, D]."""
    flat = variants.flatten(0, 2)
    return TensorDescriptor(
        flat, list(flat.shape), list(flat.stride()), [TILE_LEN // 2, TILE_LEN], SHARED)


@gluon.jit
def zone_of(tile, start, previous):
    """Return the zone of key ``tile``: 0 from ``start`` on, 1 from ``previous`` on, else 2."""
    return (tile < start).to(gl.int32) + (tile < previous).to(gl.int32)


@gluon.jit
def parity(i, stages):
    """Return the parity of a ring's full barriers in step i; its empty ones have the other."""
    return i // stages & 1


@gluon.jit
def load_tile(desc, row, column, full, smem):
    """Start one tile's copy; ``full`` completes with it."""
    mbarrier.expect(full, TILE * TILE * 2)
    tma.async_copy_global_to_shared(desc, [row, column], full, smem)


@gluon.jit
def load_queries(q_desc, q_smem, q_full, row, zone_rows, num_zones):
    """Load both halves of the query tile at ``row``, in every zone's rotation."""
    for zone in range(num_zones):
        full = q_full.index(zone)
        mbarrier.expect(full, TILE * TILE * 2)
        first = zone * zone_rows + row
        tma.async_copy_global_to_shared(q_desc, [first, 0], full, q_smem.index(2 * zone))
        tma.async_copy_global_to_shared(
            q_desc, [first + HALF, 0], full, q_smem.index(2 * zone + 1))


@gluon.jit
def wait_for_queries(q_full, num_zones):
    """Wait until the query tile is there in every zone's rotation."""
    for zone in range(num_zones):
        mbarrier.wait(q_full.index(zone), 0)


@gluon.jit
def first_step(q, k_smem, k_full, k_empty, v_full, facts, ALTER: gl.constexpr,
                SCORES: gl.constexpr, PROBS: gl.constexpr):
    """Compute the softmax of step 0. Returns p, m, total. See `step`."""
    zeros = gl.zeros([HALF, TILE], gl.float32, SCORES)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, k_smem.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(0), count=1)
    s = ALTER(s, 0, facts, SCORES)
    m = gl.maximum(gl.max(s, 1), -1e30)  # finite also for rows that see no key
    s = gl.exp2(s - m[:, None])
    mbarrier.wait(v_full.index(0), 0)
    return gl.convert_layout(s.to(k_smem.dtype), PROBS), m, gl.sum(s, 1)


@gluon.jit
def step(i, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, p, acc, m, total, facts,
          ALTER: gl.constexpr, SCORES: gl.constexpr, PROBS: gl.constexpr):
    """Compute the scores of step i beside the values of step i - 1, whose weights are p, and the
    softmax of step i beside the latter. Returns p, acc, m, total after step i.

    q: [64, D] in shared memory. ALTER: `as_they_are`, `causal` or one that adds biases; facts: what
    that one needs. To alter all scores takes as long as the exponentials do."""
    STAGES: gl.constexpr = k_smem.shape[0]
    slot = i % STAGES
    before = (i - 1) % STAGES
    zeros = gl.zeros([HALF, TILE], gl.float32, SCORES)
    mbarrier.wait(k_full.index(slot), parity(i, STAGES))
    s = warpgroup_mma(q, k_smem.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    s = ALTER(s, slot, facts, SCORES)
    mbarrier.arrive(k_empty.index(slot), count=1)
    new_m = gl.maximum(m, gl.max(s, 1))
    alpha = gl.exp2(m - new_m)
    s = gl.exp2(s - new_m[:, None])
    total = total * alpha + gl.sum(s, 1)
    new_p = gl.convert_layout(s.to(k_smem.dtype), PROBS)
    # A wait is a loop, the border of a basic block: without one ptxas moves the wait for the
    # values above the exponentials, and nothing overlaps.
    mbarrier.wait(v_full.index(slot), parity(i, STAGES))
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(before), count=1)
    return new_p, acc * alpha[:, None], new_m, total


@gluon.jit
def as_they_are(s, slot, facts, SCORES: gl.constexpr):
    """Leave scores alone."""
    return s


@gluon.jit
def causal(s, slot, facts, SCORES: gl.constexpr):
    """Hide the keys behind each row. facts: the positions of the first key and the first row; rows
    follow one another."""
    key_row, query_row = facts
    rows = query_row + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
    keys = key_row + gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
    return gl.where(keys[None, :] <= rows[:, None], s, float("-inf"))


@gluon.jit
def add_values(p, v_smem, last, acc):
    """Take in the values of the ``last`` step."""
    acc = warpgroup_mma(p, v_smem.index(last % v_smem.shape[0]), acc, is_async=True)
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def finish(out, lse, v_smem, last, p, acc, m, total, row, first_row, end_row, head, num_heads,
            SCORES: gl.constexpr):
    """Take in the values of the ``last`` step; store the rows that are queries. out: [T, H, D];
    lse: [T, H]."""
    acc = add_values(p, v_smem, last, acc)
    rows = row + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
    dims = gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
    inside = (rows >= first_row) & (rows < end_row)
    place = (rows - first_row).to(gl.int64) * num_heads + head
    gl.store(lse + place, (m + gl.log2(total)) * _LN_2, inside)
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    gl.store(out + place[:, None] * TILE + dims[None, :], result, inside[:, None])
