"""Cuts prompts into prefill chunks, and chunks into slices and pieces. Numbers only, no torch.

**Prefill chunks** end at absolute multiples of ``prefill_chunk_len``, counted from the prompt's
first token, and at the start of a sparse prompt's dense tail. Sparse attention selects keys once
per prefill chunk, so its result depends on the cuts; with absolute ones a chunk is the same whether
the tokens before it were computed or cached.

**Slices** are what one step computes of a chunk, and may be as short as the step's time asks for:

- dense tokens (a dense prompt, or a sparse prompt's tail) do not depend on the cuts: a slice is
  some of the chunk's tokens;
- a sparse chunk cannot be cut by tokens, so it is cut by work: in every layer one piece for
  projections and keys, one for the selection, then one for each `row_cuts` range of its rows
  (attention and MLP), and one for the model's last layer. Where the prompt's log-probabilities are
  wanted, the last layer is like the others, and the head has one piece for each range. The
  rows are computed in these ranges whether the chunk pauses between them or not, and apart from all
  other requests, so the numbers are the same whatever the slices were.
"""

from __future__ import annotations

from itertools import pairwise

from longspan.config import dense_tail_start

PIECE_ROWS = {"cpu": 4_096, "cuda": 65_536}
"""Rows of one piece. They take a tenth to half of a second with a small model on a CPU, and a few
dozen milliseconds with 7B parameters on an H200, where a step's budget is a tenth of a second."""


PROJECTION, SELECTION = 0.18, 0.15
"""Time of these pieces relative to all rows' attention and MLP in one layer, measured on a CPU."""
UNIT_LEN_CPU = 16
"""Dense tokens of the shortest slice on CPUs; on GPUs one KV block, as many queries as a kernel's
tile has."""


MAX_SIDE_ROOM = 32_768
"""More would take workspace from the KV cache and win nothing: a GPU is busy with less."""


def unit_len(device_type: str, block_size: int) -> int:
    """Choose the shortest dense slice worth computing on ``cpu`` or ``cuda``, tokens."""
    return min(UNIT_LEN_CPU, block_size) if device_type == "cpu" else block_size


def piece_rows(device_type: str, prefill_chunk_len: int) -> int:
    """Choose the rows of one piece on ``cpu`` or ``cuda``."""
    return min(PIECE_ROWS[device_type], prefill_chunk_len)


def side_room(prefill_chunk_len: int) -> int:
    """Return how many tokens of other prompts a step may compute beside the head's chunk."""
    return min(prefill_chunk_len // 2, MAX_SIDE_ROOM)


def row_cuts(start: int, stop: int, rows: int) -> list[int]:
    """List the positions that part a chunk's rows: its ends, and the multiples of ``rows``."""
    return [start, *range((start // rows + 1) * rows, stop, rows), stop]


def piece_shares(
    start: int, stop: int, *, num_layers: int, rows: int, is_scored: bool = False,
) -> list[float]:
    """Estimate each piece's share of a sparse prefill chunk's time, in order; their sum is 1.

    Args:
        is_scored: log-probabilities of its tokens are wanted.
    """
    cuts = row_cuts(start, stop, rows)
    attention = [(end - begin) / (stop - start) for begin, end in pairwise(cuts)]
    layer = [PROJECTION, SELECTION, *attention]
    shares = (num_layers - 1) * layer + (layer + attention if is_scored else [PROJECTION])
    total = sum(shares)
    return [share / total for share in shares]


def sparse_stop(prompt_len: int, dense_tail_len: int, block_size: int) -> int:
    """Find the end of a prompt's last sparse chunk: the dense tail's start, in whole blocks."""
    start = dense_tail_start(prompt_len, dense_tail_len)
    return start if start == prompt_len else start // block_size * block_size


def chunk_stop(cached_len: int, prompt_len: int, prefill_chunk_len: int, num_sparse: int) -> int:
    """Find the end of the prefill chunk that holds position ``cached_len``.

    Args:
        num_sparse: leading tokens that are computed sparsely (`sparse_stop`), 0 for dense prompts.
    """
    assert 0 <= cached_len < prompt_len
    stop = min((cached_len // prefill_chunk_len + 1) * prefill_chunk_len, prompt_len)
    return min(stop, num_sparse) if cached_len < num_sparse else stop


def cacheable_len(
    *, num_tokens: int, prompt_len: int, prefill_chunk_len: int, block_size: int,
    sparse: bool, dense_tail_len: int,
) -> int:
    """Count leading tokens, up to ``num_tokens``, whose keys and values others may reuse.

    Dense: every full block. Sparse: whole prefill chunks before the prompt's dense tail; and once
    the tail is reached every full block, for its hash names where the tail starts (see `blocks`).
    """
    full_blocks = num_tokens // block_size * block_size
    if not sparse:
        return full_blocks
    tail_start = dense_tail_start(prompt_len, dense_tail_len)
    if dense_tail_len and full_blocks >= tail_start:
        return full_blocks
    return min(num_tokens, tail_start) // prefill_chunk_len * prefill_chunk_len
