"""Few rows of one sequence on Hopper against the specification: awkward counts and contexts, both
released strides, poison in unused slots and outputs, graphs."""

from __future__ import annotations

import pytest
import torch

from longspan import ops
from longspan.ops import decode, reference
from longspan.ops.dense import hopper_rows
from tests.conftest import assert_close
from tests.gpu.syncs import no_syncs
from tests.gpu.test_prefill_cuda import Case, make_case, poisoned_outputs  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]
RELEASED = [(262_144, 8_192), (131_072, 4_096)]
"""chunk_size and local_size of the million-token checkpoints: strides of 253,952 and 126,976."""
ROWS = (16, 2, 3, 5, 8, 9, 13)
"""7 to 56 lanes have one consumer, 63 to 112 two."""


def check(case: Case, length: int, count: int) -> None:
    """The last ``count`` tokens of a case: right, the same twice, and without a wait."""
    args = case.args(length - count)
    with no_syncs():
        out, lse = hopper_rows.prefill_attention(*args)
        again, again_lse = hopper_rows.prefill_attention(*args)
    expected, expected_lse = reference.prefill_attention(*args)
    assert out.dtype == expected.dtype and lse.dtype == torch.float32
    what = f"{count} rows of {length} tokens"
    assert_close(out, expected, what)
    assert_close(lse, expected_lse, f"lse, {what}", torch.bfloat16)
    assert torch.equal(out, again) and torch.equal(lse, again_lse), what


@pytest.mark.parametrize("cached_len", [1, 0, 115, 127, 128, 129, 5_000, 131_071])
def test_rows_behind_a_context(cached_len: int) -> None:
    """In one DCA chunk; NaN in every slot that no token has."""
    for count in ROWS:
        case = make_case(cached_len + count)
        check(case, cached_len + count, count)


@pytest.mark.parametrize("count", [16, 5, 2])
@pytest.mark.parametrize(("chunk_size", "local_size"), RELEASED)
def test_rows_about_a_released_stride(count: int, chunk_size: int, local_size: int) -> None:
    """The context goes across the border of the first DCA chunk and of the second, between the
    rows or before them, and the rows may stand in the middle of a third."""
    stride = chunk_size - local_size
    for length in (stride + count // 2, stride + 300, 2 * stride + count // 2, 2 * stride + 5_000):
        case = make_case(length, chunk_size=chunk_size, local_size=local_size, heads=14, kv_heads=2)
        check(case, length, count)


@pytest.mark.parametrize("count", [16, 8])
@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 9])
def test_rows_about_the_border_of_many_chunks(chunks: int, count: int) -> None:
    """Chunks so short that one program has keys of several zones, or of all."""
    for length in (256 * chunks + 1, 256 * chunks + count // 2, 256 * chunks + 130):
        case = make_case(length, chunk_size=320, local_size=64)
        check(case, length, count)
        args = case.args(length - count)
        out, _ = hopper_rows.attend(*args, 3, 1)
        assert_close(out, reference.prefill_attention(*args)[0], f"one part, {length} tokens")


@pytest.mark.parametrize("heads", [(40, 8), (32, 4), (8, 8), (32, 1), (64, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_every_group(heads: tuple[int, int], dtype: torch.dtype) -> None:
    """From one row on, as many as fill a tile."""
    case = make_case(3_000, chunk_size=1_024, local_size=256, heads=heads[0], kv_heads=heads[1],
                     dtype=dtype)
    for count in {1, 2, hopper_rows.MAX_LANES * heads[1] // heads[0]}:
        check(case, 3_000, count)


@pytest.mark.parametrize(("stages", "capacity"), [(2, 33), (3, 1), (3, 32), (3, 66), (2, 300)])
def test_every_way_to_cut_the_keys(stages: int, capacity: int) -> None:
    """Also into so many parts that some rows see nothing of the last one."""
    for length, count in ((9_000, 16), (128 * 70 + 3, 16), (9_000, 8)):
        args = make_case(length, chunk_size=4_096, local_size=1_024).args(length - count)
        out, lse = hopper_rows.attend(*args, stages, capacity)
        expected, expected_lse = reference.prefill_attention(*args)
        assert_close(out, expected, "out")
        assert_close(lse, expected_lse, "lse", torch.bfloat16)


@pytest.mark.parametrize("count", [16, 5])
def test_a_graph_reads_what_its_tensors_hold(count: int) -> None:
    """Recorded once and replayed with other queries, which lie apart as those of a fused projection
    do."""
    case = make_case(20_000, chunk_size=8_192, local_size=512)
    wide = torch.randn(count, 28 + 8, 128, device="cuda", dtype=torch.bfloat16)
    case = case._replace(q=wide[:, :28])
    args = (case.q, case.cache, case.block_table, 20_000 - count, case.rotary, case.scale)
    assert hopper_rows.takes_rows(*args[:2], case.rotary, 20_000)
    ops.prefill_attention(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.prefill_attention(*args)
    for seed in range(2):
        torch.manual_seed(seed)
        wide.normal_()
        graph.replay()
        expected, expected_lse = reference.prefill_attention(*args)
        assert_close(out, expected, "out")
        assert_close(lse, expected_lse, "lse", torch.bfloat16)


def test_both_kernels_agree_behind_a_million_keys() -> None:
    case = make_case(1_000_000, chunk_size=262_144, local_size=8_192, heads=7, kv_heads=1)
    for count in (16, 8):
        args = case.args(1_000_000 - count)
        for one, other in zip(hopper_rows.prefill_attention(*args),
                              decode.prefill_attention(*args), strict=True):
            assert_close(one, other, f"{count} rows", torch.bfloat16)
