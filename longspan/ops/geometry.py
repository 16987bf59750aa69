"""Dual Chunk Attention's position arithmetic. Works on integers and on integer tensors alike.

A position p lies in DCA chunk ``p // stride``. Keys are rotated once, at ``p % stride``. A
(query, key) pair lies in exactly one zone, given by the gap between their DCA chunks, and only the
query's rotated position depends on it:

=========  =====  ==================================
zone       gap    query's rotated position
=========  =====  ==================================
``INTRA``  0      ``r``
``SUCC``   1      ``min(r + stride, clamp)``
``INTER``  >= 2   ``min(2 * stride - 1, clamp)``
=========  =====  ==================================

with ``r = p % stride``, ``stride = chunk_size - local_size`` and ``clamp = chunk_size``: the
released code's clamp, one more than the paper's c - 1 (arXiv 2402.17463 eq. 2-7). While
``chunk_size`` bounds all distances, DCA is plain RoPE; up to ``stride`` tokens there is one zone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

INTRA, SUCC, INTER = 0, 1, 2
ZONES = (INTRA, SUCC, INTER)
COARSE = 8
"""Tiles that share one mean far before the query."""
ROWS_PER_SCOUT = 8
"""At most one in so many queries is a scout, but for the least number of scouts."""
SHORT_SEGMENT = 2_048
"""Up to so many queries, as a prompt's tail has, the least number of scouts is twice as large: the
question stands among them, and they are selected for once."""


class Span(NamedTuple):
    """Keys [start, stop) of one zone, as one segment of queries sees them."""

    zone: int
    start: int
    stop: int


def query_position(position: Tensor, zone: int, stride: int, clamp: int) -> Tensor:
    """Return the rotated position of queries for keys of ``zone``. position, result: [T] int64."""
    local = position % stride
    if zone == INTRA:
        return local
    if zone == SUCC:
        return torch.clamp(local + stride, max=clamp)
    return torch.full_like(position, min(2 * stride - 1, clamp))


def one_query_position(position: int, zone: int, stride: int, clamp: int) -> int:
    """Return what `query_position` does, of one position that the host knows."""
    local = position % stride
    return (local, min(local + stride, clamp), min(2 * stride - 1, clamp))[zone]


def continuous_query_position(position: Tensor, zone: int, stride: int, clamp: int) -> Tensor:
    """Return positions of probe queries, during selection only: without a clamp, so that distances
    do not jump along a diagonal (arXiv 2501.15383, section 5.2, figure 5). Positions may exceed the
    rotation tables."""
    local = position % stride
    return local + (0, stride, clamp)[zone]


def zone_of(query: Tensor, key: Tensor, stride: int) -> Tensor:
    """Return the zone of each pair; broadcasts. Negative gaps (key after query) count as
    ``INTRA``."""
    return torch.clamp(query // stride - key // stride, min=INTRA, max=INTER)


def segments(start: int, stop: int, stride: int) -> Iterator[tuple[int, int]]:
    """Cut queries [start, stop) at DCA chunk borders."""
    while start < stop:
        end = min(stop, (start // stride + 1) * stride)
        yield start, end
        start = end


def spans(start: int, stop: int, stride: int) -> list[Span]:
    """Return the key spans of a segment [start, stop) that lies in one DCA chunk, in key order.

    The intra span ends at ``stop``; its last ``stop - start`` keys are the queries' own and need
    the causal mask.
    """
    chunk_start = start // stride * stride
    assert stop <= chunk_start + stride, "a segment lies in one DCA chunk"
    found = [Span(INTER, 0, chunk_start - stride), Span(SUCC, chunk_start - stride, chunk_start),
             Span(INTRA, chunk_start, stop)]
    return [span for span in found if span.start >= 0 and span.stop > span.start]


def num_scouts(num_queries: int, num_keys: int, at_a_million: int, most: int) -> int:
    """Return how many scouts a segment has: twice as many where there are half as many keys, for
    the pass over them takes as long then, up to ``most`` and to one of `ROWS_PER_SCOUT` queries.
    Never fewer than ``at_a_million``, twice that in a `SHORT_SEGMENT`, but for queries that are not
    there. So scouts times keys is at most ``at_a_million`` times a million, wherever the segment
    stands, but in the tail."""
    count = at_a_million
    while 2 * count <= most and 2 * count * num_keys <= at_a_million << 20:
        count *= 2
    least = at_a_million
    if num_queries <= SHORT_SEGMENT:
        least = max(at_a_million, min(2 * at_a_million, most))
    return min(num_queries, max(least, min(count, num_queries // ROWS_PER_SCOUT)))


def near_border(tile: int, near_tiles: int | None) -> int:
    """Return the first key tile that takes part in the mean correction with its own mean, for
    queries of tile ``tile``; those before it do so `COARSE` together. A multiple of `COARSE`."""
    return 0 if near_tiles is None else max(0, tile - near_tiles) // COARSE * COARSE
