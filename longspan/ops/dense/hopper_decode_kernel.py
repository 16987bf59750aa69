"""The kernel of decode on Hopper, in Gluon.

Keys and dims stand where tensor cores want many rows, and the query heads of a KV head are the
columns, 8 at least: scores are K Q^T, [keys, lanes], and outputs V^T P, [dims, lanes]. So keys and
values are the operand that may come from registers, and int8 becomes bf16 on the way there: a load
of pairs of bytes (`ldmatrix`, transposed for values) brings each thread two pairs, whose first
bytes are one operand of the tensor cores, and whose second bytes another one, of odd dims. Scales
never touch them: those of keys go to the scores, those of values to the weights. That is 1.75
instructions for each number, a quarter of what an SM issues in the time in which the memory brings
it.

A program walks one share of the key tiles of all sequences with one KV head: a producer copies
tiles and scales ahead by TMA, two consumers take half of each tile's keys, apart from one another:
each has a softmax of its own, and writes a part of its own for each sequence it meets.

The ring. Step i, counted over all tiles of a program, takes slot i % STAGES. The producer waits for
a slot's empty barrier in parity (i // STAGES & 1) ^ 1, which is done with at first; both consumers
arrive there once, when they have read their halves. Consumers wait for the full barrier in parity
i // STAGES & 1. No barrier can be two phases ahead of who waits for it: the next phase needs that
one's own arrival.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longspan.ops.tiles.hopper import HALF, SHARED, TILE, parity

CONSUMERS = gl.constexpr(2)
_LOG2_E = gl.constexpr(1.4426950408889634)
_FARTHEST = gl.constexpr(3)


@gluon.jit
def _sum_of_two(x, y):
    return x + y


@gluon.jit
def _share(context_lens, num_requests, REQUESTS: gl.constexpr, MIN_TILES: gl.constexpr):
    """Find this program's share [low, high) of all requests' key tiles, the requests of its first
    and last tile, and the first one's first tile. See `items.share_ends`."""
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    rows = gl.arange(0, REQUESTS, layout=ROW)
    lens = gl.load(context_lens + rows, rows < num_requests, other=0).to(gl.int32)
    tiles = (lens + TILE - 1) // TILE
    ends = gl.associative_scan(tiles, 0, _sum_of_two)
    total = gl.sum(tiles, 0)
    programs = gl.num_programs(1)
    per_share = gl.maximum((total + programs - 1) // programs, MIN_TILES)
    used = gl.maximum((total + per_share - 1) // per_share, 1)
    share = gl.minimum(gl.program_id(1), used)
    low, high = total * share // used, total * gl.minimum(share + 1, used) // used
    first = gl.sum((ends <= low).to(gl.int32), 0)
    last = gl.sum((ends < high).to(gl.int32), 0)
    begin = gl.sum(gl.where(ends <= low, tiles, 0), 0)
    return low, high, first, gl.where(high > low, last, first - 1), begin


@gluon.jit
def _producer(
    k_desc, v_desc, ks_desc, vs_desc, block_tables, context_lens, k_smem, v_smem, ks_smem, vs_smem,
    k_full, k_empty, v_full, v_empty, share, table_row,
):
    """Fill the ring with the tiles of a share, keys apart from values."""
    STAGES: gl.constexpr = k_smem.shape[0]
    QUANTISED: gl.constexpr = k_desc.dtype == gl.int16
    BYTES: gl.constexpr = TILE * TILE + 4 * TILE if QUANTISED else 2 * TILE * TILE
    WIDTH: gl.constexpr = k_smem.shape[2]
    low, high, first, last, begin = share
    head, num_kv_heads = gl.program_id(0), gl.num_programs(0)
    i = low * 0
    for request in range(first, last + 1):
        tiles = (gl.load(context_lens + request).to(gl.int32) + TILE - 1) // TILE
        start, stop = gl.maximum(low - begin, 0), gl.minimum(high - begin, tiles)
        table = block_tables + request.to(gl.int64) * table_row
        begin += tiles
        block = gl.load(table + start, start < stop, other=0).to(gl.int32)
        for tile in range(start, stop):
            following = gl.load(table + gl.minimum(tile + 1, stop - 1)).to(gl.int32)
            slot = i % STAGES
            row, column, scales = block * TILE, head * WIDTH, block * num_kv_heads + head
            full = k_full.index(slot)
            mbarrier.wait(k_empty.index(slot), parity(i, STAGES) ^ 1)
            mbarrier.expect(full, BYTES)
            tma.async_copy_global_to_shared(k_desc, [row, column], full, k_smem.index(slot))
            if QUANTISED:
                tma.async_copy_global_to_shared(ks_desc, [scales, 0], full, ks_smem.index(slot))
            full = v_full.index(slot)
            mbarrier.wait(v_empty.index(slot), parity(i, STAGES) ^ 1)
            mbarrier.expect(full, BYTES)
            tma.async_copy_global_to_shared(v_desc, [row, column], full, v_smem.index(slot))
            if QUANTISED:
                tma.async_copy_global_to_shared(vs_desc, [scales, 0], full, vs_smem.index(slot))
            block = following
            i += 1


@gluon.jit
def _numbers(pairs):
    """Make bf16 of the first and of the second bytes of pairs, exactly: a number n of seven low
    bits l and a sign bit s is l - 128 s, the difference of 128 + l and 128 + 128 s, and both of
    these are bf16 numbers with the bits of n in their mantissa or lowest exponent bit."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 low, sign, second;
        lop3.b32 low, $2, 0x007f007f, 0x43004300, 0xEA;
        lop3.b32 sign, $2, 0x00800080, 0x43004300, 0xEA;
        sub.rn.bf16x2 $0, low, sign;
        shr.u32 second, $2, 8;
        lop3.b32 low, second, 0x007f007f, 0x43004300, 0xEA;
        lop3.b32 sign, second, 0x00800080, 0x43004300, 0xEA;
        sub.rn.bf16x2 $1, low, sign;
        }""", "=&r,=&r,r", [pairs], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2)


@gluon.jit
def _dims(HALF_OF: gl.constexpr, QUANTISED: gl.constexpr, LAYOUT: gl.constexpr):
    """List the dims of one half or the other: of pairs of bytes the first or the second, else the
    first 64 or the last."""
    index = gl.arange(0, HALF, layout=LAYOUT)
    return 2 * index + HALF_OF if QUANTISED else HALF_OF * HALF + index


@gluon.jit
def _turn_queries(
    q_smem, queries, k_gain, cos, sin, rows, run, CONSUMER: gl.constexpr, QUANTISED: gl.constexpr,
):
    """Write a KV head's queries, turned for keys of a ``run``, times the keys' gains, to q_smem,
    [LANES, 64] for each half of the dims; lanes that are no queries are 0.

    rows: the first row's position, how many there are, heads of each, distances of rows and heads,
    the last row's DCA chunk, their length and clamp, and how many rotations there are."""
    LANES: gl.constexpr = q_smem.shape[1]
    first, num_rows, group, q_row, q_head, last_chunk, stride, clamp, num_rotations = rows
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(1, LAYOUT))
    row = gl.minimum(lane // group, num_rows - 1)
    exists = (lane < num_rows * group)[:, None]
    position = gl.maximum(first + row, 0)
    local = position % stride
    gap = position // stride - (last_chunk - run)
    turn = gl.minimum(gl.where(gap == 1, local + stride, 2 * stride - 1), clamp)
    turn = gl.where(gap <= 0, local, turn)
    turn = gl.minimum(turn, num_rotations - 1)  # of a zone without keys: any
    place = queries + (row.to(gl.int64) * q_row + (lane % group) * q_head)[:, None]
    for half in gl.static_range(2):
        dim = _dims(half, QUANTISED, gl.SliceLayout(0, LAYOUT))[None, :]
        angle = turn.to(gl.int64)[:, None] * HALF + dim % HALF
        x = gl.load(place + dim, exists, other=0.0).to(gl.float32)
        y = gl.load(place + (dim + HALF) % TILE, exists, other=0.0).to(gl.float32)
        y = gl.where(dim < HALF, -y, y)
        turned = (x * gl.load(cos + angle) + y * gl.load(sin + angle)).to(gl.bfloat16)
        if QUANTISED:  # gains are powers of two: nothing is rounded twice
            turned = (turned.to(gl.float32) * gl.load(k_gain + dim).to(gl.float32)).to(gl.bfloat16)
        q_smem.index(2 * CONSUMER + half).store(turned)
    fence_async_shared()


@gluon.jit
def _step(
    i, tile, q_smem, p_smem, k_smem, v_smem, ks_smem, vs_smem, k_full, k_empty, v_full, v_empty,
    one, other, m, total, scale, visible, CONSUMER: gl.constexpr, SUMS: gl.constexpr,
):
    """Take in this consumer's half of a tile: 64 keys. Returns one, other, m, total.

    one, other: [64, LANES] weighted sums of values, of the dims of one half and of the other.
    visible: the first position that not every row sees, the first that none does, and heads of a
    row."""
    STAGES: gl.constexpr = k_smem.shape[0]
    QUANTISED: gl.constexpr = k_smem.dtype == gl.int16
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    KEYS: gl.constexpr = gl.SliceLayout(1, SUMS)
    FIRST: gl.constexpr = CONSUMER * HALF
    slot = i % STAGES
    partly, end, group = visible
    q_one = q_smem.index(2 * CONSUMER).permute((1, 0))
    q_other = q_smem.index(2 * CONSUMER + 1).permute((1, 0))
    weights = p_smem.index(CONSUMER).permute((1, 0))
    zeros = gl.zeros([HALF, one.shape[1]], gl.float32, SUMS)
    mbarrier.wait(k_full.index(slot), parity(i, STAGES))
    keys = k_smem.index(slot).slice(FIRST, HALF)
    if QUANTISED:
        pairs = keys.load(LEFT)
        key_scale = ks_smem.index(CONSUMERS * slot + CONSUMER).load(KEYS) * scale
        mbarrier.arrive(k_empty.index(slot), count=1)
        k_one, k_other = _numbers(pairs)
    else:
        k_one, k_other = keys.slice(0, HALF, dim=1), keys.slice(HALF, HALF, dim=1)
    s = warpgroup_mma(k_one, q_one, zeros, use_acc=False, is_async=True)
    s = warpgroup_mma(k_other, q_other, s, is_async=True)
    mbarrier.wait(v_full.index(slot), parity(i, STAGES))  # beside the products
    values = v_smem.index(slot).slice(FIRST, HALF)
    if QUANTISED:
        pairs = values.permute((1, 0)).load(LEFT)
        step = vs_smem.index(CONSUMERS * slot + CONSUMER).load(KEYS)
    else:
        v_one = values.slice(0, HALF, dim=1).permute((1, 0)).load(LEFT)
        v_other = values.slice(HALF, HALF, dim=1).permute((1, 0)).load(LEFT)
    mbarrier.arrive(v_empty.index(slot), count=1)
    s = warpgroup_mma_wait(0, deps=[s])
    if QUANTISED:
        s = s * key_scale[:, None]
    else:
        mbarrier.arrive(k_empty.index(slot), count=1)
        s = s * scale
    if (tile + 1) * TILE > partly:
        key = tile * TILE + FIRST + gl.arange(0, HALF, layout=KEYS)
        lane = gl.arange(0, one.shape[1], layout=gl.SliceLayout(0, SUMS))
        seen = key[:, None] < gl.minimum(partly + lane // group, end)[None, :]
        # of slots never written scales and values may be NaN, and 0 * NaN is NaN
        s = gl.where(seen, s, float("-inf"))
        if QUANTISED:
            step = gl.where(key < end, step, 0.0)
        else:
            key = tile * TILE + FIRST + gl.arange(0, HALF, layout=gl.SliceLayout(0, LEFT))
            v_one = gl.where((key < end)[None, :], v_one, 0.0)
            v_other = gl.where((key < end)[None, :], v_other, 0.0)
    new_m = gl.maximum(m, gl.max(s, 0))
    decay = gl.exp2(m - new_m)
    p = gl.exp2(s - new_m[None, :])
    total = total * decay[None, :] + p
    if QUANTISED:
        p = p * step[:, None]
    weights.store(p.to(gl.bfloat16))
    fence_async_shared()
    if QUANTISED:
        v_one, v_other = _numbers(pairs)
    one = warpgroup_mma(v_one, weights, one * decay[None, :], is_async=True)
    other = warpgroup_mma(v_other, weights, other * decay[None, :], is_async=True)
    one, other = warpgroup_mma_wait(0, deps=[one, other])
    return one, other, new_m, total


@gluon.jit
def _consumer(given, CONSUMER: gl.constexpr):
    """Compute this consumer's halves of the tiles of a share."""
    (q, k_gain, cos, sin, parts, part_lse, context_lens, scales, q_smem, p_smem, k_smem, v_smem,
     ks_smem, vs_smem, k_full, k_empty, v_full, v_empty, share, q_row, q_head, num_rows, num_heads,
     group, stride, stride_tiles, clamp, num_rotations) = given
    LANES: gl.constexpr = q_smem.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LANES, 16])
    QUANTISED: gl.constexpr = k_smem.dtype == gl.int16
    ROWS: gl.constexpr = gl.SliceLayout(1, SUMS)
    low, high, first_request, last_request, begin = share
    head = gl.program_id(0)
    if QUANTISED:
        k_gain += head * TILE
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(0, SUMS))
    i = low * 0
    for request in range(first_request, last_request + 1):
        context_len = gl.load(context_lens + request).to(gl.int32)
        scale = gl.load(scales + request) * _LOG2_E
        tiles = (context_len + TILE - 1) // TILE
        start, stop = gl.maximum(low - begin, 0), gl.minimum(high - begin, tiles)
        begin += tiles
        last_chunk = gl.maximum(context_len - 1, 0) // stride
        first_row = context_len - num_rows
        queries = q + (request * num_rows).to(gl.int64) * q_row + head * group * q_head
        rows = (first_row, num_rows, group, q_row, q_head, last_chunk, stride, clamp,
                num_rotations)
        one = gl.zeros([HALF, LANES], gl.float32, SUMS)
        other = gl.zeros([HALF, LANES], gl.float32, SUMS)
        total = gl.zeros([HALF, LANES], gl.float32, SUMS)
        m = gl.full([LANES], -1e30, gl.float32, gl.SliceLayout(0, SUMS))  # finite without a key
        # Runs of tiles whose keys lie in one zone for each row, from the farthest on.
        farthest = gl.minimum(last_chunk - start // stride_tiles, _FARTHEST)
        nearest = gl.minimum(last_chunk - (stop - 1) // stride_tiles, _FARTHEST)
        for nearer in range(gl.where(start < stop, farthest - nearest + 1, 0)):
            run = farthest - nearer  # no product is under way
            _turn_queries(q_smem, queries, k_gain, cos, sin, rows, run, CONSUMER, QUANTISED)
            # Computed, not carried from run to run: Triton (3.6 and 3.7) loses a carried value
            # that is only a bound of an inner loop, which then begins with ``start`` each time.
            border = (last_chunk - run) * stride_tiles
            start_run = gl.where(nearer > 0, border, start)
            stop_run = gl.minimum(border + stride_tiles, stop)
            for tile in range(start_run, stop_run):
                one, other, m, total = _step(
                    i, tile, q_smem, p_smem, k_smem, v_smem, ks_smem, vs_smem, k_full, k_empty,
                    v_full, v_empty, one, other, m, total, scale,
                    (first_row + 1, context_len, group), CONSUMER, SUMS)
                i += 1
        mass = gl.sum(total, 0)
        exists = lane < num_rows * group
        part = (gl.program_id(1) + request) * CONSUMERS + CONSUMER
        row = (part * num_rows + lane // group).to(gl.int64) * num_heads
        row += head * group + lane % group
        gl.store(part_lse + row, m + gl.log2(mass), exists)
        share_of = 1.0 / gl.where(mass > 0, mass, 1.0)  # a row that sees none of the keys
        place = parts + row[None, :] * TILE
        gl.store(place + _dims(0, QUANTISED, ROWS)[:, None], one * share_of[None, :],
                 exists[None, :])
        gl.store(place + _dims(1, QUANTISED, ROWS)[:, None], other * share_of[None, :],
                 exists[None, :])


@gluon.jit(do_not_specialize=[
    "q_row", "q_head", "table_row", "num_requests", "num_rows", "num_heads", "group", "stride",
    "stride_tiles", "clamp", "num_rotations"])
def decode_kernel(
    k_desc, v_desc, ks_desc, vs_desc, k_gain, block_tables, context_lens, scales, q, cos, sin,
    parts, part_lse, q_row, q_head, table_row, num_requests, num_rows, num_heads, group, stride,
    stride_tiles, clamp, num_rotations, LANES: gl.constexpr, STAGES: gl.constexpr,
    REQUESTS: gl.constexpr, MIN_TILES: gl.constexpr, REGISTERS: gl.constexpr,
):
    """Compute one share of all requests' key tiles for one KV head: a partial out, normalised, and
    its LSE to base 2 for each request and consumer."""
    QUANTISED: gl.constexpr = k_desc.dtype == gl.int16
    WIDTH: gl.constexpr = k_desc.block_shape[1]
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [2 * CONSUMERS, LANES, HALF], SHARED)
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, LANES, HALF], SHARED)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE, WIDTH], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, TILE, WIDTH], v_desc.layout)
    ks_smem, vs_smem, ks_halves, vs_halves = k_smem, v_smem, k_smem, v_smem  # not read
    if QUANTISED:
        ks_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, TILE], ks_desc.layout)
        vs_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, TILE], vs_desc.layout)
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        ks_halves = ks_smem._reinterpret(gl.float32, [CONSUMERS * STAGES, HALF], FLAT)
        vs_halves = vs_smem._reinterpret(gl.float32, [CONSUMERS * STAGES, HALF], FLAT)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=CONSUMERS)
        mbarrier.init(v_empty.index(slot), count=CONSUMERS)
    fence_async_shared()
    share = _share(context_lens, num_requests, REQUESTS, MIN_TILES)
    given = (q, k_gain, cos, sin, parts, part_lse, context_lens, scales, q_smem, p_smem, k_smem,
                v_smem, ks_halves, vs_halves, k_full, k_empty, v_full, v_empty, share, q_row,
                q_head, num_rows, num_heads, group, stride, stride_tiles, clamp, num_rotations)
    producer = (k_desc, v_desc, ks_desc, vs_desc, block_tables, context_lens, k_smem, v_smem,
                ks_smem, vs_smem, k_full, k_empty, v_full, v_empty, share, table_row)
    gl.warp_specialize([
        (_consumer, (given, gl.constexpr(0))),
        (_consumer, (given, gl.constexpr(1))),
        (_producer, producer),
    ], [4, 1], [REGISTERS, 24])
