"""How long the sparse prefill chunks of a pipeline are: longer ones further in. No torch.

A selection belongs to its chunk, so cuts may depend on the absolute position and on nothing else:
selections, prefix cache and answers then stay functions of the prompt's tokens, whatever the
prompt's length and the schedule. A pipeline wants short chunks where a prompt begins, since it
fills and drains with one, and long ones far in, where each chunk pays a selection that grows with
its history. With S stages, rung k has chunks of ``base * 2^k`` tokens and begins at ``S * base *
4^k``: the chunk grows with the root of the position, as the best one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

SHORTEST_CHUNK = 8_192
"""Shorter chunks would pay more for selections than a pipeline wins by them (an H200)."""
MOST_BELOW = 4
"""Where the longest chunk is short (CPUs), the shortest one is at least that over this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """Lengths of sparse prefill chunks by position."""

    longest: int
    """Chunk length of the last rung, tokens."""
    num_stages: int = 1
    """Stages of the pipeline; 1: every chunk has the longest length."""
    block_size: int = 1
    """Tokens of a KV block: chunks are whole blocks where the longest one is."""

    @property
    def rungs(self) -> tuple[tuple[int, int], ...]:
        """Return (position from which on it holds, chunk length) by position. A rung begins at a
        multiple of its chunks' length."""
        return _rungs(self.longest, self.num_stages, self.block_size)

    def chunk(self, position: int) -> tuple[int, int]:
        """Return start and end of the chunk that holds a position."""
        for begin, length in reversed(self.rungs):
            if position >= begin:
                start = position // length * length
                return start, start + length
        raise AssertionError("the first rung begins at 0")

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Return the chunks' parts between two positions, in order."""
        while start < stop:
            end = min(self.chunk(start)[1], stop)
            yield start, end
            start = end

    def whole(self, stop: int) -> int:
        """Return where the last chunk ends that is complete before ``stop``."""
        start, end = self.chunk(stop)
        return stop if end == stop else start


@lru_cache(maxsize=64)
def _rungs(longest: int, num_stages: int, block_size: int) -> tuple[tuple[int, int], ...]:
    base, num_halvings = longest, 0
    shortest = min(SHORTEST_CHUNK, longest // MOST_BELOW)
    while num_stages > 1 and base % (2 * block_size) == 0 and base // 2 >= shortest:
        base, num_halvings = base // 2, num_halvings + 1
    return ((0, base), *((num_stages * base * 4**k, base * 2**k)
                         for k in range(1, num_halvings + 1)))
