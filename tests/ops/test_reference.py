"""The specification's small pieces: rotation, norm, activation, cache writes, what is visible."""

from __future__ import annotations

import math

import pytest
import torch

from longspan.ops import reference
from longspan.ops.types import PagedKV, Selection
from tests.conftest import assert_close, write_rotated
from tests.ops import oracle
from tests.ops.oracle import Positions


def test_rotate_is_the_half_split_layout() -> None:
    """Component i turns with component i + D/2, by the angle's sign convention of checkpoints."""
    x = torch.randn(5, 3, 8)
    angles = torch.randn(5, 4)
    result = reference.rotate(x, angles.cos(), angles.sin())
    turned = (torch.view_as_complex(torch.stack(x.double().chunk(2, -1), -1))
              * torch.polar(torch.ones(5, 1, 4).double(), angles.double()[:, None]))
    assert_close(result, torch.cat((turned.real, turned.imag), -1))
    assert reference.rotate(x.bfloat16(), angles.cos(), angles.sin()).dtype == torch.bfloat16


def test_rotate_depends_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 16)
    rotary = oracle.tables(16, Positions(4097, 1), 4097)

    def score(query: int, key: int) -> float:
        turned = [reference.rotate(x, rotary.cos[[at]], rotary.sin[[at]])
                  for x, at in ((q, query), (k, key))]
        return float((turned[0] * turned[1]).sum())

    assert score(100, 37) == pytest.approx(score(4063, 4000), abs=1e-4)
    assert score(100, 37) != pytest.approx(score(37, 100), abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rms_norm(dtype: torch.dtype) -> None:
    """As transformers: normalised in fp32, rounded, then weighted. [..., M] of any rank."""
    x, weight = 3 * torch.randn(7, 2, 63, dtype=dtype), torch.randn(63, dtype=dtype)
    result = reference.rms_norm(x, weight, 1e-6)
    wide = x.double()
    assert result.dtype == dtype
    assert_close(result, wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight)
    assert reference.rms_norm(torch.zeros(1, 4), torch.ones(4), 1e-6).eq(0).all()


def test_silu_mul_takes_the_gate_first() -> None:
    gate, up = torch.randn(2, 111, 24)
    result = reference.silu_mul(torch.cat((gate, up), -1))
    assert_close(result, gate.double() * torch.sigmoid(gate.double()) * up)


def test_store_kv_touches_its_slots_only() -> None:
    """Scattered slots of two blocks; every other slot keeps its NaN."""
    shape = (6, 4, 2, 8)
    cache = PagedKV(torch.full(shape, math.nan), torch.full(shape, math.nan))
    slots = torch.tensor([5, 23, 4, 20])
    k, v = torch.randn(2, 4, 2, 8)
    write_rotated(cache, k, v, slots)
    for stored, written in ((cache.k, k), (cache.v, v)):
        flat = stored.flatten(0, 1)
        assert torch.equal(flat[slots], written)
        untouched = torch.ones(24, dtype=torch.bool)
        untouched[slots] = False
        assert flat[untouched].isnan().all()


def test_store_kv_keeps_the_means_of_full_blocks() -> None:
    """A block filled in three writes, a part of another: the full one's means are exact, whatever
    the cache held before; means of blocks that nobody touched stay."""
    cache = PagedKV(*(torch.full((5, 4, 2, 8), math.nan) for _ in range(2)),
                    *(torch.full((5, 2, 8), math.nan) for _ in range(2)))
    k, v = torch.randn(2, 6, 2, 8)
    for rows, slots in (([0], [12]), ([1, 2, 3], [13, 14, 15]), ([4, 5], [0, 1])):
        write_rotated(cache, k[rows], v[rows], torch.tensor(slots))
    assert cache.k_mean is not None and cache.v_mean is not None
    assert_close(cache.k_mean[3], k[:4].double().mean(0))
    assert_close(cache.v_mean[3], v[:4].double().mean(0))
    write_rotated(cache, k[4:], v[4:], torch.tensor([2, 3]))
    assert_close(cache.k_mean[0], k[[4, 5, 4, 5]].double().mean(0))
    assert cache.k_mean[[1, 2, 4]].isnan().all()


def test_store_kv_means_of_a_bf16_cache_are_summed_in_fp32() -> None:
    """The mean of 128 stored keys, rounded once."""
    cache = PagedKV(*(torch.zeros(1, 128, 1, 8, dtype=torch.bfloat16) for _ in range(2)),
                    *(torch.zeros(1, 1, 8, dtype=torch.bfloat16) for _ in range(2)))
    k = 10 + torch.randn(128, 1, 8)
    write_rotated(cache, k, k, torch.arange(128))
    assert cache.k_mean is not None
    assert torch.equal(cache.k_mean[0], cache.k[0].float().mean(0).bfloat16())


def test_store_kv_rotates_and_keeps_the_means_of_filled_blocks() -> None:
    """Two blocks of 4, in two writes; row 1 of the second is padding."""
    positions = Positions(32, 8)
    rotary = oracle.tables(8, positions, 64)
    cache = PagedKV(*(torch.full((3, 4, 2, 8), math.nan) for _ in range(2)),
                    *(torch.full((3, 2, 8), math.nan) for _ in range(2)))
    k, v = torch.randn(2, 6, 2, 8)
    at = torch.tensor([22, 23, 24, 25, 26, 27])
    for rows, slots, filled in (([0, 1], [8, 9], []), ([2, 3, 4, 5], [10, -1, 11, 0], [2, -1])):
        reference.store_kv(cache, k[rows], v[rows], at[rows], torch.tensor(slots),
                           torch.tensor(filled, dtype=torch.int64), rotary)
    turned = oracle.rotate_pair(k, torch.outer((at % 24).double(), rotary.inv_freq.double()))
    assert_close(cache.k[2], turned[[0, 1, 2, 4]])
    assert torch.equal(cache.v[2], v[[0, 1, 2, 4]])
    assert torch.equal(cache.v[0, 0], v[5]) and cache.v[0, 1:].isnan().all()
    assert cache.k_mean is not None and cache.v_mean is not None
    assert_close(cache.k_mean[2], turned[[0, 1, 2, 4]].mean(0))
    assert_close(cache.v_mean[2], v[[0, 1, 2, 4]].double().mean(0))
    assert cache.k_mean[:2].isnan().all()


def test_add_rms_norm_is_the_norm_of_the_sum() -> None:
    x, residual, weight = torch.randn(5, 12), torch.randn(5, 12), torch.randn(12)
    total = x + residual
    out, same = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert same is residual and torch.equal(residual, total)
    assert_close(out, reference.rms_norm(total, weight, 1e-6))


def test_gather_kv_follows_the_block_table() -> None:
    case = oracle.make_case(63, Positions(256, 32), num_heads=2, num_kv_heads=2)
    _, v = reference.gather_kv(case.cache, case.block_table, 50)
    assert torch.equal(v, case.v[:50])


@pytest.mark.parametrize("aligned", [True, False], ids=["tile", "any"])
def test_kept_pairs_of_a_hand_written_selection(aligned: bool) -> None:
    """Tiles of 4, queries 6 to 9: by eye."""
    selection = Selection(torch.tensor([[1, 7]]), torch.tensor([[0, -4]]), 4, aligned)
    kept = reference.kept_pairs(selection, torch.arange(6, 10), 10)[0]
    aligned_rows = [  # tiles start at 4 and 8
        [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7], [1, 4, 5, 6, 7, 8], [1, 4, 5, 6, 7, 8, 9]]
    own_rows = [  # one tile, from the first query
        [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8],
        [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    rows = aligned_rows if aligned else own_rows
    assert [row.nonzero().flatten().tolist() for row in kept] == rows


def test_kept_pairs_of_hand_written_lists() -> None:
    """Tiles of 4, queries 6 to 9: the tile at 4 lists nothing, the one at 8 the keys 0 to 3, of
    which one is a column."""
    tiles = torch.tensor([[[0, -1], [-1, -1], [0, -1]]], dtype=torch.int32)
    selection = Selection(torch.tensor([[1, 7]]), torch.tensor([[0]]), 4, True, None, tiles, 0)
    kept = reference.kept_pairs(selection, torch.arange(6, 10), 10)[0]
    assert [row.nonzero().flatten().tolist() for row in kept] == [
        [1, 4, 5, 6], [1, 4, 5, 6, 7], [0, 1, 2, 3, 7, 8], [0, 1, 2, 3, 7, 8, 9]]
    later = selection._replace(tiles=tiles[:, 1:], first_tile=1)
    assert torch.equal(reference.kept_pairs(later, torch.arange(6, 10), 10)[0], kept)
