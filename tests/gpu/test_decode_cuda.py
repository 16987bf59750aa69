"""Split-KV decode, compiled, behind long contexts: few rows of one sequence, released strides."""

from __future__ import annotations

import pytest
import torch

from longspan.ops import decode, reference
from tests.conftest import assert_close
from tests.gpu.syncs import no_syncs
from tests.gpu.test_prefill_cuda import make_case

pytestmark = pytest.mark.gpu
RELEASED = [(262_144, 8_192), (131_072, 4_096)]
"""chunk_size and local_size of the million-token checkpoints: strides of 253,952 and 126,976."""


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 18, 31])
@pytest.mark.parametrize(("chunk_size", "local_size"), RELEASED)
def test_few_rows_behind_a_released_stride(count: int, chunk_size: int, local_size: int) -> None:
    """The rows stand on both sides of the border of the first DCA chunk, of the second, and in
    the middle of a third."""
    stride = chunk_size - local_size
    for length in (stride + count // 2, 2 * stride + count // 2 + 1, 2 * stride + 5_000):
        case = make_case(length, chunk_size=chunk_size, local_size=local_size, heads=14, kv_heads=2)
        args = case.args(length - count)
        assert decode.takes_rows(args[0], case.cache, case.rotary)
        with no_syncs():
            out, lse = decode.prefill_attention(*args)
        expected, expected_lse = reference.prefill_attention(*args)
        assert_close(out, expected, f"out, {length} tokens")
        assert_close(lse, expected_lse, "lse", torch.bfloat16)


@pytest.mark.parametrize("heads", [(28, 4), (40, 8), (32, 4), (8, 8), (32, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_every_group(heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Up to as many as two launches take."""
    case = make_case(3_000, chunk_size=1_024, local_size=256, heads=heads[0], kv_heads=heads[1],
                     dtype=dtype)
    for count in (1, 2, 3, 7, 2 * (decode.MAX_ROWS * heads[1] // heads[0])):
        args = case.args(3_000 - count)
        assert decode.takes_rows(args[0], case.cache, case.rotary)
        out, _ = decode.prefill_attention(*args)
        assert_close(out, reference.prefill_attention(*args)[0], f"{count} rows")
