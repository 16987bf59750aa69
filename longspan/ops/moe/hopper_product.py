"""The grouped product of routed experts on Hopper, in Gluon: both ways of an expert's MLP.

As many programs as the GPU has multiprocessors walk over all tiles of 128 rows x 256 columns, in
three partitions of their warps: two consumers of 64 rows each, and a producer that fills a ring of
four slots of 128 bytes of every row and column. Weights come by TMA. So do rows that lie in the
order of the experts; tokens, which do not, by `cp.async`, from where they are: copied side by side
first, they would be written and read once more, a gigabyte each way.

Tiles of a row tile follow one another, so that those at work at a time, a few hundred, share the
rows and the weights of one or two experts in the L2 cache. What a tile needs stands in tables that
`list_tiles` writes, one load away, and is read a tile ahead: a chain of loads before or behind six
steps of a product would cost as much as three of them.

The ring. Step i, counted over all tiles of a program, takes slot i % 4. The producer waits for the
slot's empty barrier in parity (i // 4 & 1) ^ 1, which is done with at first; both consumers arrive
there once, after the step's product. Consumers wait for its full barrier in parity i // 4 & 1: an
arrival for the bytes that TMA will bring, and where rows are gathered one of each of the producer's
128 threads, when its copies are there. A barrier cannot be two phases ahead of who waits for it:
the next phase needs that one's own arrival.

The second consumer begins two steps behind the first, and the ring keeps it so: when one rounds and
stores its results, the other has the tensor cores. That hides about a thousand cycles: results go
to shared memory in pieces of 128 bytes a row, two at a time, and TMA takes them from there. Each
expert's rows fill whole tiles, so no row is another's.

Hidden rows in e4m3 have a scale for each 128 columns, what a tile of the way up makes and a step of
the way down takes: sums are kept in units of the step's scale, and change units between two steps,
which costs no registers, as second sums would.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

TILE_ROWS, TILE_COLUMNS, STEP_BYTES = 128, 256, 128

ROWS = gl.constexpr(128)
HALF = gl.constexpr(64)  # rows of one consumer
COLUMNS = gl.constexpr(256)
WIDE = gl.constexpr(128)  # columns of one copy of weights, and of one scale of hidden rows
STAGES = gl.constexpr(4)
LAG = gl.constexpr(2)
GATHERERS = gl.constexpr(128)  # threads that copy tokens
PIECES = gl.constexpr(2)  # pieces of a consumer's results on their way
E4M3_MAX, TINY = gl.constexpr(448.0), gl.constexpr(1e-12)
MINUS_LOG2_E = gl.constexpr(-1.4426950408889634)


@gluon.jit
def _expert(tiles, index, count, COLUMN_TILES: gl.constexpr):
    """Return a tile's expert; of one behind the last, the first."""
    return gl.load(tiles + index // COLUMN_TILES, mask=index < count, other=0)


@gluon.jit
def _count(tiles, max_row_tiles, COLUMN_TILES: gl.constexpr):
    """Return how many tiles there are: their number stands behind the table."""
    return gl.load(tiles + max_row_tiles) * COLUMN_TILES


@gluon.jit
def _producer(
    a, b_desc, tiles, tokens, a_smem, b_smem, full, empty, max_row_tiles, steps,
    matrix_rows, second, a_row, COLUMN_TILES: gl.constexpr, GATHERED: gl.constexpr,
):
    """Fill the ring. Of columns that are gate and up, a tile has 128 each, ``second`` apart."""
    DEPTH: gl.constexpr = a_smem.shape[2]
    VECTOR: gl.constexpr = DEPTH // 8
    LANES: gl.constexpr = gl.BlockedLayout([1, VECTOR], [4, 8], [4, 1], [1, 0])
    count = _count(tiles, max_row_tiles, COLUMN_TILES)
    expert = _expert(tiles, gl.program_id(0), count, COLUMN_TILES)
    i = steps * 0
    for index in range(gl.program_id(0), count, gl.num_programs(0)):
        row = index // COLUMN_TILES * ROWS
        column = expert * matrix_rows + index % COLUMN_TILES * (WIDE if GATHERED else COLUMNS)
        if GATHERED:
            rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LANES))
            depths = gl.arange(0, DEPTH, layout=gl.SliceLayout(0, LANES))
            places = a + gl.load(tokens + rows).to(gl.int64)[:, None] * a_row + depths[None, :]
        expert = _expert(tiles, index + gl.num_programs(0), count, COLUMN_TILES)
        for k in range(steps):
            slot = i % STAGES
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)
            if GATHERED:
                mbarrier.expect(bar, COLUMNS * 128)
                async_copy.async_copy_global_to_shared(a_smem.index(slot), places + k * DEPTH)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:
                mbarrier.expect(bar, (ROWS + COLUMNS) * 128)
                tma.async_copy_global_to_shared(a, [row, k * DEPTH], bar, a_smem.index(slot))
            tma.async_copy_global_to_shared(
                b_desc, [column, k * DEPTH], bar, b_smem.index(2 * slot))
            tma.async_copy_global_to_shared(
                b_desc, [column + second, k * DEPTH], bar, b_smem.index(2 * slot + 1))
            i += 1


@gluon.jit
def _multiply(
    i, a_smem, b_smem, full, empty, steps, GATHERED: gl.constexpr, PART: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Compute one tile's sums [64, 256] from step i on. Returns them and the next step."""
    acc = gl.zeros([HALF, COLUMNS], gl.float32, SUMS)
    for k in range(steps):
        slot = i % STAGES
        mbarrier.wait(full.index(slot), i // STAGES & 1)
        if GATHERED:
            fence_async_shared()  # copies by threads, which the tensor cores read
        acc = warpgroup_mma(a_smem.index(2 * slot + PART), b_smem.index(slot).permute((1, 0)), acc,
                            use_acc=k > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])  # the step before is done
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=k > 0)
        i += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
    return acc, i


@gluon.jit
def _multiply_scaled(
    i, a_smem, b_smem, full, empty, steps, scales, max_rows, PART: gl.constexpr,
    SUMS: gl.constexpr,
):
    """As `_multiply`, where each step's rows have scales. scales: [64] where those of the first
    step stand; those of the next are ``max_rows`` behind."""
    acc = gl.zeros([HALF, COLUMNS], gl.float32, SUMS)
    scale, following = gl.load(scales), gl.load(scales + max_rows)
    for k in range(steps):
        slot = i % STAGES
        mbarrier.wait(full.index(slot), i // STAGES & 1)
        acc = warpgroup_mma(a_smem.index(2 * slot + PART), b_smem.index(slot).permute((1, 0)), acc,
                            use_acc=k > 0, is_async=True)
        later = gl.load(scales + (k + 2) * max_rows, mask=k + 2 < steps, other=1.0)
        change = scale / following  # behind the last step: to the unit 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(slot), count=1)
        acc = acc * change[:, None]
        scale, following = following, later
        i += 1
    return acc, i


@gluon.jit
def _halves(part, PARTS: gl.constexpr):
    """Cut [64, N] into the left and the right half, registers as they are."""
    left, right = gl.split(gl.permute(
        gl.reshape(part, (HALF, 2, part.shape[1] // 2)), (0, 2, 1)))
    return (gl.convert_layout(left, PARTS, assert_trivial=True),
            gl.convert_layout(right, PARTS, assert_trivial=True))


@gluon.jit
def _swiglu(gate, up):
    """Compute silu(gate) * up by two instructions of the special function unit: what a division
    does besides, for quotients below the least normal number, would be a third of the epilogue. Of
    large negative gates the power is inf, and the quotient 0, as it should be."""
    sigmoid = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1; add.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;",
        "=&f,f", [gate * MINUS_LOG2_E], dtype=gl.float32, is_pure=True, pack=1)
    return gate * sigmoid * up


@gluon.jit
def _round(part):
    """Round [64, 128] to e4m3, each row with a scale of its own. Returns what is in range, and the
    scales: the conversion takes what rounding has put above the largest number for that."""
    scale = gl.maximum(gl.max(gl.abs(part), 1) / E4M3_MAX, TINY)
    return part * (1.0 / scale)[:, None], scale


@gluon.jit
def _store(part, out, row, column, stage, PENDING: gl.constexpr):
    """Hand [64, 128 bytes] to TMA, once all but the last ``PENDING`` pieces have been read."""
    tma.store_wait(PENDING)
    stage.store(part.to(stage.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, column], stage)


@gluon.jit
def _store_wide(part, out, row, column, stage, FIRST: gl.constexpr, PIECE: gl.constexpr):
    """Store [64, 128] of two bytes in two pieces."""
    left, right = _halves(part, PIECE)
    _store(left, out, row, column, stage.index(FIRST), PIECES - 1)
    _store(right, out, row, column + HALF, stage.index(FIRST + 1), PIECES - 1)


@gluon.jit
def _consumer(
    out, tiles, row_scales, scales, hidden_scales, a_smem, b_smem, stage, full, empty,
    max_row_tiles, steps, matrix_rows, second, COLUMN_TILES: gl.constexpr,
    GATHERED: gl.constexpr, SCALED: gl.constexpr, PART: gl.constexpr,
):
    """Compute 64 rows of every tile: of gate and up, silu(gate) * up; of the way down, outputs."""
    INNER: gl.constexpr = 256 // a_smem.dtype.primitive_bitwidth
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, INNER])
    PARTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, INNER])
    PIECE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, INNER])
    count = _count(tiles, max_row_tiles, COLUMN_TILES)
    expert = _expert(tiles, gl.program_id(0), count, COLUMN_TILES)
    if PART == 1:
        mbarrier.wait(full.index(LAG), 0, pred=gl.program_id(0) < count)
    own = PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, PARTS))
    summed = PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, SUMS))
    columns = gl.arange(0, COLUMNS, layout=gl.BlockedLayout([2], [32], [4], [0]))
    columns += columns // WIDE * (second - WIDE)
    max_rows = max_row_tiles * ROWS
    i = steps * 0
    for index in range(gl.program_id(0), count, gl.num_programs(0)):
        row = index // COLUMN_TILES * ROWS
        column_tile = index % COLUMN_TILES
        column = column_tile * (WIDE if GATHERED else COLUMNS)
        if SCALED:  # read here, used behind the product
            column_scales = gl.load(scales + expert * matrix_rows + column + columns)
            expert = _expert(tiles, index + gl.num_programs(0), count, COLUMN_TILES)
            if GATHERED:
                factor = gl.load(row_scales + row + own)
        if SCALED and not GATHERED:
            acc, i = _multiply_scaled(i, a_smem, b_smem, full, empty, steps,
                                      row_scales + row + summed, max_rows, PART, SUMS)
        else:
            acc, i = _multiply(i, a_smem, b_smem, full, empty, steps, GATHERED, PART, SUMS)
        if SCALED:
            acc = acc * gl.convert_layout(column_scales, gl.SliceLayout(0, SUMS))[None, :]
        left, right = _halves(acc, PARTS)
        if GATHERED:
            if SCALED:
                left = left * factor[:, None]
                right = right * factor[:, None]
            hidden = _swiglu(left, right)
            if SCALED:
                hidden, scale = _round(hidden)
                _store(hidden, out, row + PART * HALF, column, stage.index(PIECES * PART), 0)
                # behind that one's fence, which would wait for it
                gl.store(hidden_scales + column_tile * max_rows + row + own, scale)
            else:
                _store_wide(hidden, out, row + PART * HALF, column, stage, PIECES * PART, PIECE)
        else:
            _store_wide(left, out, row + PART * HALF, column, stage, PIECES * PART, PIECE)
            _store_wide(right, out, row + PART * HALF, column + WIDE, stage, PIECES * PART, PIECE)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["max_row_tiles", "steps"])
def product_kernel(
    a, b_desc, out, tiles, tokens, row_scales, scales, hidden_scales, max_row_tiles, steps,
    matrix_rows, second, a_row, COLUMN_TILES: gl.constexpr, GATHERED: gl.constexpr,
    SCALED: gl.constexpr,
):
    """Multiply each expert's rows with its matrix, of ``matrix_rows`` outputs.

    a: tokens [T, M], by way of ``tokens``, where GATHERED, and the product is gate and up; else a
    descriptor of rows [P, F]. out: a descriptor of [P, F] or [P, M]. Where SCALED, scales are all
    experts' outputs', one under the other, row_scales [P] or [F / 128, P], and hidden_scales, of
    the latter shape, those of what is stored on the way up.
    """
    DEPTH: gl.constexpr = b_desc.block_shape[1]
    b_half = gl.allocate_shared_memory(b_desc.dtype, [2 * STAGES, WIDE, DEPTH], b_desc.layout)
    b_smem = b_half._reinterpret(b_desc.dtype, [STAGES, COLUMNS, DEPTH], b_desc.layout)
    a_smem = gl.allocate_shared_memory(b_desc.dtype, [STAGES, ROWS, DEPTH], b_desc.layout)
    a_half = a_smem._reinterpret(b_desc.dtype, [2 * STAGES, HALF, DEPTH], b_desc.layout)
    stage = gl.allocate_shared_memory(
        out.dtype, [2 * PIECES, HALF, out.block_shape[1]], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1 + GATHERERS if GATHERED else 1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    LOADERS: gl.constexpr = 4 if GATHERED else 1
    CONSUMER_REGISTERS: gl.constexpr = 224 if GATHERED else 232
    PRODUCER_REGISTERS: gl.constexpr = 56 if GATHERED else 40
    gl.warp_specialize([
        (_consumer, (
            out, tiles, row_scales, scales, hidden_scales, a_half, b_smem, stage, full, empty,
            max_row_tiles, steps, matrix_rows, second,
            gl.constexpr(COLUMN_TILES), gl.constexpr(GATHERED), gl.constexpr(SCALED),
            gl.constexpr(0))),
        (_consumer, (
            out, tiles, row_scales, scales, hidden_scales, a_half, b_smem, stage, full, empty,
            max_row_tiles, steps, matrix_rows, second,
            gl.constexpr(COLUMN_TILES), gl.constexpr(GATHERED), gl.constexpr(SCALED),
            gl.constexpr(1))),
        (_producer, (
            a, b_desc, tiles, tokens, a_smem, b_half, full, empty, max_row_tiles, steps,
            matrix_rows, second, a_row, gl.constexpr(COLUMN_TILES), gl.constexpr(GATHERED))),
    ], [4, LOADERS], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
