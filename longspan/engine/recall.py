"""What callers see of a sparse prefill's recall. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Recall(NamedTuple):
    """Share of the attention mass that sparse prefill kept for a prompt, measured on some rows of
    each prefill chunk: exp(lse_sparse - lse_full), the mean over layers, heads and chunks. Tile
    means count as nothing kept (arXiv 2501.15383, section 5.3)."""

    typical: float
    """Mean over rows spread over the prompt."""
    scouts: float | None
    """Mean over the rows that look least like their chunk's mean query, which are those that look
    something up; None: the plan has no scouts."""
    num_tokens: int
    """Prompt tokens that the numbers cover: computed for this request, and sparsely. Tokens from
    the prefix cache are not among them."""


def merged(parts: Sequence[Recall]) -> Recall | None:
    """Return the recall of several prompts together, by tokens; None: nothing was sparse."""
    count = sum(part.num_tokens for part in parts)
    if not count:
        return None
    found = [(part.scouts, part.num_tokens) for part in parts if part.scouts is not None]
    weight = sum(tokens for _, tokens in found)
    return Recall(
        sum(part.typical * part.num_tokens for part in parts) / count,
        sum(scouts * tokens for scouts, tokens in found) / weight if weight else None, count)
