"""The portable prefill kernels, compiled: production shapes against the fp32 specification."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from longspan.attention.rope import build_rotary
from longspan.config import DcaConfig
from longspan.ops import reference
from longspan.ops.dense import triton as prefill
from longspan.ops.sparse import triton as vertical_slash
from longspan.ops.types import PagedKV, QueryRotary, Selection
from tests.conftest import SEED, _poisoned, assert_close, write_rotated
from tests.gpu.syncs import no_syncs
from tests.ops import oracle

pytestmark = pytest.mark.gpu
BLOCK, DEVICE, BF16 = 128, "cuda", torch.bfloat16


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a kernel does not write stays NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    yield


class Case(NamedTuple):
    """One request wholly in the cache; NaN in every other slot."""

    q: Tensor
    cache: PagedKV
    block_table: Tensor
    rotary: QueryRotary
    scale: float

    def args(self, start: int) -> tuple[Tensor, PagedKV, Tensor, int, QueryRotary, float]:
        return self.q[start:], self.cache, self.block_table, start, self.rotary, self.scale


def make_case(
    length: int, *, chunk_size: int = 1 << 20, local_size: int = 256, heads: int = 28,
    kv_heads: int = 4, head_dim: int = 128, dtype: torch.dtype = BF16, first_block: int = 0,
) -> Case:
    num_blocks = -(-length // BLOCK)
    shape = (first_block + num_blocks + 2, BLOCK, kv_heads, head_dim)
    k, v = (torch.empty(shape, dtype=dtype, device=DEVICE) for _ in range(2))
    means = (k.new_empty(shape[0], kv_heads, head_dim) for _ in range(2))
    cache = PagedKV(k, v, *means)
    table = first_block + torch.randperm(num_blocks + 2, device=DEVICE)[:num_blocks]
    positions = torch.arange(length, device=DEVICE)
    rotary = build_rotary(
        head_dim=head_dim, rope_theta=1e6, max_model_len=max(length, 4096), device=DEVICE,
        dca=DcaConfig(chunk_size=chunk_size, local_size=local_size))
    rows = positions % rotary.stride
    keys = torch.randn(length, kv_heads, head_dim, device=DEVICE, dtype=dtype)
    write_rotated(
        cache, reference.rotate(keys, rotary.cos[rows], rotary.sin[rows]), torch.randn_like(keys),
        table[positions // BLOCK] * BLOCK + positions % BLOCK)
    q = torch.randn(length, heads, head_dim, device=DEVICE, dtype=dtype)
    return Case(q, cache, table, rotary, 1.3 / math.sqrt(head_dim))


def make_selection(
    rng: random.Random, heads: int, start: int, length: int, aligned: bool
) -> Selection:
    """Budgets that differ between heads; windows beyond the history; one head without columns; in
    tile mode, lists of further key tiles."""
    tile_len = BLOCK if aligned else 64
    columns, offsets = [], []
    for head in range(heads):
        count = 0 if head == 1 else rng.randrange(0, length // 3 + 1)
        columns.append(torch.tensor(sorted(rng.sample(range(length), count)), dtype=torch.int64))
        if aligned:
            num_tiles = -(-length // BLOCK)
            far = rng.sample(range(1, num_tiles + 3), rng.randrange(0, min(20, num_tiles + 2)))
            row = [-gap * BLOCK for gap in sorted({0, *range(rng.randrange(1, 9)), *far})]
        else:
            row, position = [], -rng.randrange(0, tile_len)
            for _ in range(rng.randrange(1, 80)):
                row.append(position)
                position -= rng.choice([1, 1, 1, tile_len, tile_len + 1, rng.randrange(1, 700)])
        offsets.append(torch.tensor(row))
    pad = torch.nn.utils.rnn.pad_sequence
    selection = Selection(
        pad(columns, batch_first=True, padding_value=-1).to(DEVICE),
        pad(offsets, batch_first=True, padding_value=tile_len).to(DEVICE), tile_len, aligned,
        tuple(len(row) for row in columns))
    return oracle.with_lists(rng, selection, start, length, 12) if aligned else selection


# length, first query, chunk_size: lengths without and with history, one, two and three zones
SHAPES = [
    (63, 0, 1 << 20), (111, 0, 1 << 20), (129, 128, 1 << 20), (4097, 4096, 1024),
    (4097, 3000, 1 << 20), (4097, 2999, 1024), (4097, 3800, 2560), (20011, 19500, 6912),
]


@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize(("length", "start", "chunk_size"), SHAPES)
def test_dense_equals_reference(length: int, start: int, chunk_size: int, head_dim: int) -> None:
    case = make_case(length, chunk_size=chunk_size, head_dim=head_dim)
    expected_out, expected_lse = reference.prefill_attention(*case.args(start))
    for splits in (1, 5):
        out, lse = prefill.split_prefill_attention(*case.args(start), splits)
        assert_close(out, expected_out, f"out of {splits} parts")
        assert_close(lse, expected_lse, f"lse of {splits} parts", BF16)
    assert_close(prefill.prefill_attention(*case.args(start))[0], expected_out, "out")


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (40, 8), (7, 1), (4, 4)])
def test_dense_in_fp16(heads: int, kv_heads: int) -> None:
    case = make_case(1111, chunk_size=640, heads=heads, kv_heads=kv_heads, dtype=torch.float16)
    out, lse = prefill.prefill_attention(*case.args(1000))
    expected_out, expected_lse = reference.prefill_attention(*case.args(1000))
    assert_close(out, expected_out, "out", BF16)
    assert_close(lse, expected_lse, "lse", BF16)


@pytest.mark.parametrize("mode", ["tile", "tile-corrected", "paper"])
@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize(("length", "start", "chunk_size"), SHAPES)
def test_sparse_equals_reference(
    length: int, start: int, chunk_size: int, head_dim: int, mode: str
) -> None:
    case = make_case(length, chunk_size=chunk_size, head_dim=head_dim)
    selection = make_selection(random.Random(SEED), 28, start, length, mode != "paper")
    args = (*case.args(start), selection, mode == "tile-corrected")
    out, lse, kept = vertical_slash.sparse_prefill_attention(*args)
    expected_out, expected_lse, expected_kept = reference.sparse_prefill_attention(*args)
    assert float(kept) == float(expected_kept)
    assert_close(out, expected_out, "out")
    assert_close(lse, expected_lse, "lse", BF16)


@pytest.mark.parametrize("mode", ["dense", "tile", "paper"])
def test_cache_beyond_two_billion_elements(mode: str) -> None:
    """Blocks whose first element lies past 2^31: index arithmetic in 64 bits."""
    case = make_case(1500, chunk_size=640, first_block=(1 << 31) // (BLOCK * 4 * 128) + 1)
    assert case.cache.k.numel() > 1 << 31
    if mode == "dense":
        out, _ = prefill.prefill_attention(*case.args(1400))
        expected, _ = reference.prefill_attention(*case.args(1400))
    else:
        selection = make_selection(random.Random(SEED), 28, 1400, 1500, mode == "tile")
        args = (*case.args(1400), selection, mode == "tile")
        out, _, _ = vertical_slash.sparse_prefill_attention(*args)
        expected, _, _ = reference.sparse_prefill_attention(*args)
    assert_close(out, expected, "out")


@pytest.mark.parametrize("mode", ["dense", "tile", "paper"])
def test_nothing_waits_for_the_device(mode: str) -> None:
    case = make_case(4097, chunk_size=1024)
    selection = make_selection(random.Random(SEED), 28, 3900, 4097, mode == "tile")

    def step() -> Tensor:
        if mode == "dense":
            return prefill.prefill_attention(*case.args(3900))[0]
        return vertical_slash.sparse_prefill_attention(
            *case.args(3900), selection, mode == "tile")[0]

    first = step()  # compiles
    with no_syncs():
        second = step()
    assert torch.equal(first, second)
