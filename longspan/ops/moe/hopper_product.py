"""The grouped product of routed experts on Hopper, in Gluon: both ways of an expert's MLP.

As many programs as the GPU has multiprocessors walk over all tiles of 128 rows x 256 columns, in
three partitions of their warps: two consumers of 64 rows each, and a producer that fills a ring of
four slots of 128 bytes of every row and column. Weights come by TMA. So do rows that lie in the
order of the experts; tokens, which do not, by `cp.async`, from where they are: copied side by side
first, they would be written and read once more, a gigabyte each way.

Tiles of a row tile follow one another, so that those at work at a time, a few hundred, share the
rows and the weights of one or two experts in the L2 cache. Which rows a tile has stands in a table
that `list_tiles` writes: the host knows shapes alone.

The ring. Step i, counted over all tiles of a program, takes slot i % 4. The producer waits for the
slot's empty barrier in parity (i // 4 & 1) ^ 1, which is done with at first; both consumers arrive
there once, after the step's product. Consumers wait for its full barrier in parity i // 4 & 1: an
arrival for the bytes that TMA will bring, and where rows are gathered one of each of the producer's
128 threads, when its copies are there. A barrier cannot be two phases ahead of who waits for it:
the next phase needs that one's own arrival.

The second consumer begins two steps behind the first, and the ring keeps it so: when one rounds and
stores its results, the other has the tensor cores.
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
WIDE = gl.constexpr(128)  # columns of one copy of weights, and of one store
STAGES = gl.constexpr(4)
LAG = gl.constexpr(2)
GATHERERS = gl.constexpr(128)  # threads that copy tokens


@gluon.jit
def _tile(tiles, index, column_tiles):
    """Return a tile's expert, its first row, where the expert's rows end, and its column tile."""
    place = tiles + index // column_tiles * 3
    return gl.load(place), gl.load(place + 1), gl.load(place + 2), index % column_tiles


@gluon.jit
def _count(tiles, max_row_tiles, column_tiles):
    """Return how many tiles there are: their number stands behind the table."""
    return gl.load(tiles + max_row_tiles * 3) * column_tiles


@gluon.jit
def _producer(
    a, b_desc, tiles, order, a_smem, b_smem, full, empty, max_row_tiles, column_tiles, steps,
    matrix_rows, second, num_chosen, a_row, GATHERED: gl.constexpr,
):
    """Fill the ring. Of columns that are gate and up, a tile has 128 each, ``second`` apart."""
    DEPTH: gl.constexpr = a_smem.shape[2]
    VECTOR: gl.constexpr = DEPTH // 8
    LANES: gl.constexpr = gl.BlockedLayout([1, VECTOR], [4, 8], [4, 1], [1, 0])
    i = steps * 0
    for index in range(gl.program_id(0), _count(tiles, max_row_tiles, column_tiles),
                       gl.num_programs(0)):
        expert, row, stop, column_tile = _tile(tiles, index, column_tiles)
        column = expert * matrix_rows + column_tile * (WIDE if GATHERED else COLUMNS)
        if GATHERED:
            # rows behind the expert's last one are computed with it, and not stored
            rows = gl.minimum(row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LANES)), stop - 1)
            tokens = gl.load(order + rows) // num_chosen
            depths = gl.arange(0, DEPTH, layout=gl.SliceLayout(0, LANES))
            places = a + tokens.to(gl.int64)[:, None] * a_row + depths[None, :]
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
def _pass(i, full, empty, steps):
    """Leave a tile's steps to the other consumer. Returns the step behind them."""
    for _ in range(steps):
        slot = i % STAGES
        mbarrier.wait(full.index(slot), i // STAGES & 1)
        mbarrier.arrive(empty.index(slot), count=1)
        i += 1
    return i


@gluon.jit
def _halves(acc, PARTS: gl.constexpr):
    """Cut [64, 256] into the left and the right half, registers as they are."""
    left, right = gl.split(gl.permute(gl.reshape(acc, (HALF, 2, WIDE)), (0, 2, 1)))
    return (gl.convert_layout(left, PARTS, assert_trivial=True),
            gl.convert_layout(right, PARTS, assert_trivial=True))


@gluon.jit
def _scaled(part, row_scale, scales, PARTS: gl.constexpr):
    """Multiply sums [64, 128] by both operands' scales."""
    columns = gl.arange(0, WIDE, layout=gl.SliceLayout(0, PARTS))
    return part * row_scale[:, None] * gl.load(scales + columns)[None, :]


@gluon.jit
def _store(part, place, is_row, stage, LANES: gl.constexpr):
    """Store [64, 128] by rows, 16 bytes a thread. place: [64] where each row begins."""
    stage.store(part.to(stage.dtype))
    columns = gl.arange(0, WIDE, layout=gl.SliceLayout(0, LANES))
    gl.store(place[:, None] + columns[None, :], stage.load(LANES), is_row[:, None])


@gluon.jit
def _consumer(
    out, tiles, order, weights, row_scales, scales, a_smem, b_smem, stage, full, empty,
    max_row_tiles, column_tiles, steps, matrix_rows, second, num_chosen, out_row,
    GATHERED: gl.constexpr, SCALED: gl.constexpr, PART: gl.constexpr,
):
    """Compute 64 rows of every tile: of gate and up, silu(gate) * up, to be stored in the order of
    the experts; of the way down, outputs by their routes' weights, in the order of the routes."""
    INNER: gl.constexpr = 256 // a_smem.dtype.primitive_bitwidth
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, INNER])
    PARTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, INNER])
    LANES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    count = _count(tiles, max_row_tiles, column_tiles)
    if PART == 1:
        mbarrier.wait(full.index(LAG), 0, pred=gl.program_id(0) < count)
    own = PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, PARTS))
    stored = PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, LANES))
    i = steps * 0
    for index in range(gl.program_id(0), count, gl.num_programs(0)):
        expert, row, stop, column_tile = _tile(tiles, index, column_tiles)
        if row + PART * HALF < stop:
            own_rows = gl.minimum(row + own, stop - 1)
            is_row = row + stored < stop
            target = row + stored
            # read here, used behind the product
            if GATHERED:
                if SCALED:
                    factor = gl.load(row_scales + gl.load(order + own_rows) // num_chosen)
            else:
                factor = gl.load(weights + gl.load(order + own_rows))
                if SCALED:
                    factor = factor * gl.load(row_scales + own_rows)
                target = gl.load(order + gl.minimum(target, stop - 1))
            acc, i = _multiply(i, a_smem, b_smem, full, empty, steps, GATHERED, PART, SUMS)
            left, right = _halves(acc, PARTS)
            column = column_tile * (WIDE if GATHERED else COLUMNS)
            place = out + target.to(gl.int64) * out_row + column
            if SCALED:
                own_scales = scales + expert * matrix_rows + column
                left = _scaled(left, factor, own_scales, PARTS)
                right = _scaled(right, factor, own_scales + second, PARTS)
            elif not GATHERED:
                left = left * factor[:, None]
                right = right * factor[:, None]
            if GATHERED:
                # of large negative gates the power is inf, and the quotient 0, as it should be
                _store(left / (1.0 + gl.exp(-left)) * right, place, is_row, stage, LANES)
            else:
                _store(left, place, is_row, stage, LANES)
                _store(right, place + WIDE, is_row, stage, LANES)
        else:
            i = _pass(i, full, empty, steps)


@gluon.jit(do_not_specialize=["max_row_tiles", "column_tiles", "steps", "num_chosen"])
def product_kernel(
    a, b_desc, out, tiles, order, weights, row_scales, scales, max_row_tiles, column_tiles, steps,
    matrix_rows, second, num_chosen, a_row, out_row, GATHERED: gl.constexpr, SCALED: gl.constexpr,
):
    """Multiply each expert's rows with its matrix, of ``matrix_rows`` outputs.

    a: tokens [T, M], by way of ``order``, where GATHERED, and the product is gate and up; else a
    descriptor of rows [R, F]. weights, row_scales, scales: of routes, of a's rows, of all experts'
    outputs one under the other; the first are read on the way down, the others where SCALED.
    """
    DEPTH: gl.constexpr = b_desc.block_shape[1]
    b_half = gl.allocate_shared_memory(b_desc.dtype, [2 * STAGES, WIDE, DEPTH], b_desc.layout)
    b_smem = b_half._reinterpret(b_desc.dtype, [STAGES, COLUMNS, DEPTH], b_desc.layout)
    a_smem = gl.allocate_shared_memory(b_desc.dtype, [STAGES, ROWS, DEPTH], b_desc.layout)
    a_half = a_smem._reinterpret(b_desc.dtype, [2 * STAGES, HALF, DEPTH], b_desc.layout)
    STAGED: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=16, rank=2)
    stage = gl.allocate_shared_memory(out.dtype.element_ty, [2, HALF, WIDE], STAGED)
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
            out, tiles, order, weights, row_scales, scales, a_half, b_smem, stage.index(0), full,
            empty, max_row_tiles, column_tiles, steps, matrix_rows, second,
            num_chosen, out_row, gl.constexpr(GATHERED), gl.constexpr(SCALED), gl.constexpr(0))),
        (_consumer, (
            out, tiles, order, weights, row_scales, scales, a_half, b_smem, stage.index(1), full,
            empty, max_row_tiles, column_tiles, steps, matrix_rows, second,
            num_chosen, out_row, gl.constexpr(GATHERED), gl.constexpr(SCALED), gl.constexpr(1))),
        (_producer, (
            a, b_desc, tiles, order, a_smem, b_half, full, empty, max_row_tiles, column_tiles,
            steps, matrix_rows, second, num_chosen, a_row, gl.constexpr(GATHERED))),
    ], [4, LOADERS], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
