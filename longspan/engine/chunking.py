"""The length of the next prefill chunk: numbers in, a number out. No torch.

Cuts lie at absolute multiples of ``prefill_chunk_len``, counted from the prompt's first token.
Sparse attention selects keys once per prefill chunk, so its result depends on the cuts; with
absolute ones a chunk is the same whether the tokens before it were computed or cached. Dense
attention does not depend on the cuts, so a dense chunk may be shortened to fit a busy step. A
latency model that varies the cuts belongs here, and would have to plan them by position too.
"""

from __future__ import annotations

from longspan.config import dense_tail_start


def next_chunk_len(
    *, cached_len: int, prompt_len: int, prefill_chunk_len: int, budget: int,
    block_size: int, sparse: bool,
) -> int:
    """Prompt tokens to compute now, from ``cached_len`` on; 0 when none fit ``budget``."""
    assert 0 <= cached_len < prompt_len
    cut = (cached_len // prefill_chunk_len + 1) * prefill_chunk_len
    wanted = min(cut, prompt_len) - cached_len
    if wanted <= budget:
        return wanted
    if sparse:
        return 0
    return max(0, (cached_len + budget) // block_size * block_size - cached_len)


def cacheable_len(
    *, num_tokens: int, prompt_len: int, prefill_chunk_len: int, block_size: int,
    sparse: bool, dense_tail_len: int,
) -> int:
    """Leading tokens, at most ``num_tokens``, whose keys and values other requests may reuse.

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
