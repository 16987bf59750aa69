"""Cuts prompts into prefill chunks, and chunks into slices and pieces. Numbers only, no torch.

**Prefill chunks** end at absolute positions, counted from the prompt's first token: at multiples of
``prefill_chunk_len``, or where a pipeline's ladder has them (`longspan.engine.control.ladder`); and
at the start of a sparse prompt's tail, from which they are counted anew. Sparse attention selects
keys once per prefill chunk, so its result depends on the cuts; with absolute ones a chunk is the
same whether the tokens before it were computed or cached. The tail, the prompt's last tokens, is a
chunk of its own, since what stands there is a question: another question about the same document
shares all chunks before it, and the question gets a selection of its own.

**Slices** are what one step computes of a chunk, and may be as short as the step's time asks for:

- tokens of a dense prompt do not depend on the cuts: a slice is some of the chunk's tokens;
- a sparse chunk cannot be cut by tokens, so it is cut by work: in every layer one piece for
  projections and keys, one for the selection, then one for each `row_cuts` range of its rows
  (attention and MLP), and one for the model's last layer. Where the prompt's log-probabilities are
  wanted, the last layer is like the others, and the head has one piece for each range. The
  rows are computed in these ranges whether the chunk pauses between them or not, and apart from all
  other requests, so the numbers are the same whatever the slices were.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from longspan.engine.control.ladder import Ladder

PIECE_ROWS = {"cpu": 4_096, "cuda": 65_536}
"""Rows of one piece. They take a tenth to half of a second with a small model on a CPU, and a few
dozen milliseconds with 7B parameters on an H200, where a step's budget is a tenth of a second."""
ROW_UNIT = 128
"""Rows of a piece are a multiple of the longest tile, if the chunk is longer than one piece."""
PROJECTION = 0.15
"""Share of a layer's matrix products that its first piece has, measured on a CPU."""
UNIT_LEN_CPU = 16
"""Dense tokens of the shortest slice on CPUs; on GPUs one KV block, as many queries as a kernel's
tile has."""


MAX_SIDE_ROOM = 32_768
"""More would take workspace from the KV cache and win nothing: a GPU is busy with less."""


def unit_len(device_type: str, block_size: int) -> int:
    """Choose the shortest dense slice worth computing on ``cpu`` or ``cuda``, tokens."""
    return min(UNIT_LEN_CPU, block_size) if device_type == "cpu" else block_size


def piece_rows(device_type: str, prefill_chunk_len: int) -> int:
    """Choose the rows of one piece on ``cpu`` or ``cuda``: equal parts of a chunk, where they can
    be whole tiles."""
    most = PIECE_ROWS[device_type]
    parts = -(-prefill_chunk_len // most)
    is_even = prefill_chunk_len % (parts * ROW_UNIT) == 0
    return prefill_chunk_len // parts if is_even else min(most, prefill_chunk_len)


def side_room(prefill_chunk_len: int) -> int:
    """Return how many tokens of other prompts a step may compute beside the head's chunk."""
    return min(prefill_chunk_len // 2, MAX_SIDE_ROOM)


def row_cuts(start: int, stop: int, rows: int) -> list[int]:
    """List the positions that part a chunk's rows: its ends, and the multiples of ``rows``."""
    return [start, *range((start // rows + 1) * rows, stop, rows), stop]


class Piece(NamedTuple):
    """What a piece has of a sparse prefill chunk's work; of each kind the shares' sum is 1."""

    linear: float
    """Share of what grows with the rows."""
    attention: float
    """Share of what grows with rows and history."""
    selection: float
    """Share of what grows with the history."""


def chunk_pieces(
    start: int, stop: int, *, num_layers: int, rows: int, is_scored: bool = False,
) -> list[Piece]:
    """List a sparse prefill chunk's pieces, in order.

    Args:
        is_scored: log-probabilities of its tokens are wanted.
    """
    if num_layers == 1 and not is_scored:
        return [Piece(1.0, 1.0, 1.0)]
    cuts = row_cuts(start, stop, rows)
    parts = [(end - begin) / (stop - start) for begin, end in pairwise(cuts)]
    projection = Piece(PROJECTION, 0.0, 0.0)
    layer = [projection, Piece(0.0, 0.0, 1.0),
             *(Piece((1 - PROJECTION) * part, part, 0.0) for part in parts)]
    head = [Piece((1 - PROJECTION) * part, 0.0, 0.0) for part in parts]
    pieces = (num_layers - 1) * layer + (layer + head if is_scored else [projection])
    totals = [sum(shares) for shares in zip(*pieces, strict=True)]
    return [Piece(*(share / total for share, total in zip(piece, totals, strict=True)))
            for piece in pieces]


def tail_start(prompt_len: int, tail_len: int, block_size: int) -> int:
    """Find where a sparse prompt's tail starts; ``prompt_len`` where there is none.

    It holds at least ``tail_len`` tokens, and starts at a KV block and nearly at a multiple of half
    of that, so that prompts of nearly the same length share what is before it.
    """
    if tail_len == 0:
        return prompt_len
    step = max(1, tail_len // 2)
    return max(0, prompt_len - tail_len) // step * step // block_size * block_size


def chunk_stop(cached_len: int, prompt_len: int, ladder: Ladder, tail: int) -> int:
    """Find the end of the prefill chunk that holds position ``cached_len``.

    Args:
        tail: where a sparse prompt's tail starts (`tail_start`), 0 for dense prompts.
    """
    assert 0 <= cached_len < prompt_len
    if cached_len < tail:
        return min(ladder.chunk(cached_len)[1], tail, prompt_len)
    chunk = (cached_len - tail) // ladder.longest
    return min(tail + (chunk + 1) * ladder.longest, prompt_len)


def cacheable_len(
    *, num_tokens: int, prompt_len: int, ladder: Ladder, block_size: int, sparse: bool,
    tail_len: int,
) -> int:
    """Count leading tokens, up to ``num_tokens``, whose keys and values others may reuse.

    Dense: every full block. Sparse: the prompt's chunks, up to the last one that is whole or ends
    where the tail starts; what follows belongs to this prompt alone.
    """
    if not sparse:
        return num_tokens // block_size * block_size
    tail, stop = tail_start(prompt_len, tail_len, block_size), min(num_tokens, prompt_len)
    if num_tokens >= tail < prompt_len:
        return tail + (stop - tail) // ladder.longest * ladder.longest
    return ladder.whole(stop)
