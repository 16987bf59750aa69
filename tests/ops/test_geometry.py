"""DCA positions against a pair-by-pair oracle, and against the paper's worked figure."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan.ops import geometry
from longspan.ops.geometry import INTER, INTRA, SUCC, Span
from tests.conftest import SEED
from tests.ops.oracle import Positions, distance, distance_matrix

# chunk_size, local_size: local window longer than, equal to and shorter than the stride
SHAPES = [Positions(8, 3), Positions(8, 4), Positions(8, 7), Positions(9, 1), Positions(64, 16),
          Positions(100, 37), Positions(111, 63)]
IDS = [f"chunk{p.chunk_size}-local{p.local_size}" for p in SHAPES]

# Figure 2(b) of the report: chunk length 5, local window 3, pre-trained length 8
FIGURE_LAST_ROWS = {
    "paper": [[7, 6, 5, 4, 3, 7, 6, 5, 4, 3, 3, 2, 1, 0],
              [7, 6, 5, 4, 3, 7, 6, 5, 4, 3, 4, 3, 2, 1, 0]],
    "released": [[8, 7, 6, 5, 4, 8, 7, 6, 5, 4, 3, 2, 1, 0],
                 [8, 7, 6, 5, 4, 8, 7, 6, 5, 4, 4, 3, 2, 1, 0]],
}


def our_distances(length: int, positions: Positions, clamp: int | None = None) -> torch.Tensor:
    """[length, length] from geometry's functions; 0 above the diagonal."""
    stride, clamp = positions.stride, clamp or positions.chunk_size
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    zone = geometry.zone_of(query, key, stride)
    result = torch.zeros(length, length, dtype=torch.int64)
    for z in geometry.ZONES:
        rotated = geometry.query_position(query, z, stride, clamp)
        result = torch.where(zone == z, rotated - key % stride, result)
    return torch.where(key <= query, result, 0)


@pytest.mark.parametrize("positions", SHAPES, ids=IDS)
def test_distances_equal_pair_by_pair_oracle(positions: Positions) -> None:
    length = 4 * positions.stride + 3
    assert torch.equal(our_distances(length, positions), distance_matrix(length, positions))


@pytest.mark.parametrize(("rule", "clamp"), [("paper", 7), ("released", 8)])
def test_worked_figure_under_both_clamps(rule: str, clamp: int) -> None:
    """The paper clamps at c - 1, released code at c; both rows of the figure differ only there."""
    rows = our_distances(15, Positions(8, 3), clamp)
    assert [rows[13, :14].tolist(), rows[14].tolist()] == FIGURE_LAST_ROWS[rule]


def test_figure_diagonal_under_the_paper_clamp() -> None:
    """Figure 5's caption: the diagonal at offset 7, read upwards."""
    diagonal = our_distances(15, Positions(8, 3), 7).diagonal(-7)
    assert diagonal.flip(0).tolist() == [5, 6, 7, 3, 4, 5, 6, 7]


RELEASED = [(262_144, 253_952), (131_072, 126_976)]
"""Chunk size and stride."""


@pytest.mark.parametrize(("chunk_size", "stride"), RELEASED)
def test_ours_is_the_released_clamp(chunk_size: int, stride: int) -> None:
    """Largest distance of the released models: 262,144, not 262,143; of later ones half of it."""
    far = torch.tensor([1_009_999])
    assert geometry.query_position(far, INTER, stride, chunk_size).item() == chunk_size
    last = torch.tensor([2 * stride - 1])
    assert geometry.query_position(last, SUCC, stride, chunk_size).item() == chunk_size
    assert geometry.query_position(last, INTRA, stride, chunk_size).item() == stride - 1


@pytest.mark.parametrize("positions", SHAPES, ids=IDS)
def test_identity_up_to_chunk_size(positions: Positions) -> None:
    """Plain RoPE distances while chunk_size bounds them: every pair of the first
    min(chunk_size, 2 * stride) + 1 positions, and one zone only up to ``stride`` tokens."""
    length = min(positions.chunk_size + 1, 2 * positions.stride)
    plain = torch.arange(length)[:, None] - torch.arange(length)[None]
    assert torch.equal(our_distances(length, positions), plain.clamp(min=0))
    positions_ = torch.arange(positions.stride)
    zones = geometry.zone_of(positions_[:, None], positions_[None], positions.stride)
    assert (zones == INTRA).all()
    rotated = geometry.query_position(positions_, INTRA, positions.stride, positions.chunk_size)
    assert torch.equal(rotated, positions_)


def test_identity_ends_at_chunk_size() -> None:
    """The next position is clamped: the identity above is not vacuous."""
    positions = Positions(64, 16)
    assert distance(65, 0, positions) == 64 == int(our_distances(66, positions)[65, 0])


@pytest.mark.parametrize("positions", SHAPES, ids=IDS)
def test_continuous_positions_follow_diagonals(positions: Positions) -> None:
    """Selection positions grow by one with the query inside a DCA chunk, in every zone, start
    where the true ones start, and are never smaller."""
    stride = positions.stride
    query = torch.arange(3 * stride, 4 * stride)
    for zone in geometry.ZONES:
        continuous = geometry.continuous_query_position(query, zone, stride, positions.chunk_size)
        true = geometry.query_position(query, zone, stride, positions.chunk_size)
        assert (continuous.diff() == 1).all()
        assert (continuous >= true).all()
    intra = geometry.continuous_query_position(query, INTRA, stride, positions.chunk_size)
    assert torch.equal(intra, query % stride)
    succ = geometry.continuous_query_position(query, SUCC, stride, positions.chunk_size)
    assert torch.equal(succ, stride + query % stride)
    inter = geometry.continuous_query_position(query, INTER, stride, positions.chunk_size)
    assert torch.equal(inter, positions.chunk_size + query % stride)


@given(start=st.integers(0, 400), length=st.integers(1, 400), stride=st.integers(1, 120))
def test_segments_tile_the_range_inside_chunks(start: int, length: int, stride: int) -> None:
    found = list(geometry.segments(start, start + length, stride))
    covered = [p for first, last in found for p in range(first, last)]
    assert covered == list(range(start, start + length))
    assert all(first // stride == (last - 1) // stride for first, last in found)
    assert len(found) == (start + length - 1) // stride - start // stride + 1


@given(chunk=st.integers(0, 5), stride=st.integers(1, 60), data=st.data())
def test_spans_partition_the_keys_by_zone(chunk: int, stride: int, data: st.DataObject) -> None:
    start = chunk * stride + data.draw(st.integers(0, stride - 1))
    stop = data.draw(st.integers(start + 1, (chunk + 1) * stride))
    found = geometry.spans(start, stop, stride)
    assert [key for span in found for key in range(span.start, span.stop)] == list(range(stop))
    for span in found:
        keys = torch.arange(span.start, span.stop)
        assert (geometry.zone_of(torch.tensor(start), keys, stride) == span.zone).all()


def test_spans_refuse_a_segment_over_a_border() -> None:
    with pytest.raises(AssertionError, match="one DCA chunk"):
        geometry.spans(4, 6, 5)
    assert geometry.spans(5, 6, 5) == [Span(SUCC, 0, 5), Span(INTRA, 5, 6)]


@pytest.mark.parametrize(("chunk_size", "stride"), RELEASED)
def test_released_geometry_at_random_pairs(chunk_size: int, stride: int) -> None:
    """The released sizes, where no full matrix fits: 1,000 random pairs up to 1,010,000."""
    rng, positions = random.Random(SEED), Positions(chunk_size, chunk_size - stride)
    assert positions.stride == stride
    for _ in range(1000):
        query = rng.randrange(1_010_000)
        key = rng.randrange(query + 1)
        zone = int(geometry.zone_of(torch.tensor(query), torch.tensor(key), stride))
        rotated = geometry.query_position(torch.tensor([query]), zone, stride, chunk_size)
        assert int(rotated) - key % stride == distance(query, key, positions)
        assert 0 <= int(rotated) - key % stride <= chunk_size


def test_more_scouts_where_there_are_fewer_keys() -> None:
    """Never fewer than at a million keys, and the pass over all keys never longer."""
    assert [geometry.num_scouts(131_072, keys, 128, 1024) for keys in (
        2_000_000, 1 << 20, 600_000, 1 << 19, 1 << 18, 5_000)] == [128, 128, 128, 256, 512, 1024]
    assert [geometry.num_scouts(5_000, 5_000, 100, most) for most in (0, 199)] == [100, 100]
    for queries, stop in ((126_976, 1_000_000), (131_072, 999_000), (32_768, 250_000)):
        for keys in range(queries, stop, queries):  # whatever the position
            assert geometry.num_scouts(queries, keys, 128, 4096) * keys <= 128 << 20


def test_scouts_are_few_of_the_queries() -> None:
    """An eighth at most, and so many up to 32,768 tokens in one chunk; as many as at a million keys
    where there are as many queries."""
    assert [geometry.num_scouts(queries, 24_576, 128, 4096) for queries in (
        24_576, 65_536, 8_192, 2_049, 100)] == [3072, 4096, 1024, 256, 100]
    assert [geometry.num_scouts(length, length, 128, 4096) for length in (
        8_192, 16_384, 32_768, 32_769)] == [1024, 2048, 4096, 2048]


def test_a_tail_has_more_scouts() -> None:
    """Twice the least number, where the plan allows it."""
    assert [geometry.num_scouts(1_400, keys, 128, 4096) for keys in (1 << 20, 20_000)] == [256, 256]
    assert [geometry.num_scouts(1_400, 1 << 20, 256, most) for most in (0, 256, 300)] == [
        256, 256, 300]
