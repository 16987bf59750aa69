"""How long the sparse prefill chunks of a pipeline are: longer ones further in. No torch.

A selection belongs to its chunk, so cuts may depend on the absolute position and on nothing else:
selections, prefix cache and answers then stay functions of the prompt's tokens, whatever the
prompt's length and the schedule. A pipeline fills and drains with one chunk on each stage after the
first, so its chunks should be short; and each one costs every stage a selection, which looks
through the history, so they should be long, and longer far in. On H200s a prompt of L tokens is
fastest in chunks of some ``L / 4 S`` with S stages. A ladder has to serve every L, so its chunks
begin longer than that and end shorter: x tokens in they have some ``(x + R) / 3.6 S`` tokens, and
``R / 0.8 S`` at most, where R is `REACH`.

Each stretch of ``longest`` tokens is cut into equal parts of about that length, as it is where the
stretch begins. A stretch ends where a chunk ends, so no chunk has a border of DCA inside if no
stretch has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

REACH = 131_072
"""Tokens from which on a chunk is about in proportion to its position."""
REACH_IN_STRETCHES = 4
"""Where stretches are short (CPUs), prompts are too: the reach is at most so many of them."""
GROWTH = 3.6
"""One stage's chunk would be what is before it and the reach, divided by this ..."""
LEAST_PARTS = 0.8
"""... and at most the reach divided by this."""
SHORTEST_CHUNK = 8_192
"""Shorter chunks would pay more for selections than a pipeline wins by them (an H200)."""
MOST_PARTS = 4
"""Where the longest chunk is short, the shortest one is at least that over this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """Lengths of sparse prefill chunks by position."""

    longest: int
    """Length of a stretch that is cut into equal chunks, or is one, tokens."""
    num_stages: int = 1
    """Stages of the pipeline; 1: every chunk has the longest length."""
    block_size: int = 1
    """Tokens of a KV block: chunks are whole blocks where the longest one is."""

    def chunk(self, position: int) -> tuple[int, int]:
        """Return start and end of the chunk that holds a position."""
        index, offset = divmod(position, self.longest)
        ends = _ends(index, self.longest, self.num_stages, self.block_size)
        end = next(end for end in ends if offset < end)
        start = max((other for other in ends if other <= offset), default=0)
        return index * self.longest + start, index * self.longest + end

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


@lru_cache(maxsize=1024)
def _ends(index: int, longest: int, num_stages: int, block_size: int) -> tuple[int, ...]:
    """Return where a stretch's chunks end, tokens after its start."""
    if num_stages == 1 or longest % block_size:
        return (longest,)
    reach, start = min(REACH, REACH_IN_STRETCHES * longest), index * longest
    wanted = longest * num_stages * max(GROWTH / (start + reach), LEAST_PARTS / reach)
    shortest = max(block_size, min(SHORTEST_CHUNK, longest // MOST_PARTS))
    count, num_blocks = max(1, min(round(wanted), longest // shortest)), longest // block_size
    return tuple(num_blocks * part // count * block_size for part in range(1, count + 1))
