"""What sparse prefill chunks of several lengths took on one GPU, step by step, from the committed
rows of ``bench pipeline``, and what follows for a chunk's selection and its attention.

A chunk's products and the rest are known from other rows; what is left of its time is attention to
what was selected, and the selection itself, which a short chunk pays like a long one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longspan.engine.control.chunking import tail_start
from longspan.engine.control.ladder import Ladder
from longspan.ops.geometry import segments

Cuts = Sequence[tuple[int, int]]
BLOCK_SIZE = 128
"""Tokens of a KV block; chunks end at multiples."""
SHORTEST = 2_048
"""Shorter steps tell launches rather than work, and are not fitted: prompts' tails."""
STRETCHES = tuple(0.25 * step for step in range(1, 25))
"""Tried for `SparseRates.stretch`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One sparse prefill chunk, measured."""

    start: int
    stop: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseRates:
    """Seconds that a sparse chunk's attention and selection take on one GPU."""

    pair_s: float
    """One query and key of one head among what a selection keeps."""
    stretch: float
    """A head with the budget B keeps ``B (1 - exp(-L / (stretch B)))`` keys of L."""
    shrink: float
    """Share of what is kept that each token of a chunk's length costs: keys of the chunk itself
    that stand behind a query."""
    selection_s: tuple[float, float]
    """One selection of one layer: fixed, for a token of context."""


def sparse_cuts(num_tokens: int, ladder: Ladder, tail_len: int) -> Cuts:
    """Cut a sparse prompt as the engine does: the ladder's chunks, and a tail of its own."""
    tail = tail_start(num_tokens, tail_len, BLOCK_SIZE)
    rest = ((tail, num_tokens),) if tail < num_tokens else ()
    return *ladder.parts(0, tail), *rest


def num_selections(start: int, stop: int, stride: int) -> int:
    """Count a chunk's selections: one for each of DCA's chunks, ``stride`` long, that it is in."""
    return sum(1 for _ in segments(start, stop, stride))


def kept_keys(
    budgets: NDArray[np.float64], start: int, stop: int, stretch: float,
) -> NDArray[np.float64]:
    """Return the keys kept by all queries between two positions together, for heads of these
    budgets (see `SparseRates.stretch`)."""
    reach = stretch * budgets
    return budgets * (stop - start + reach * (np.exp(-stop / reach) - np.exp(-start / reach)))


def read_steps(row: Mapping[str, Any], tail_len: int) -> list[Step]:
    """Return a row's steps: a sparse prompt in chunks of one length on one GPU."""
    length = int(row["plan"].removeprefix("fixed "))
    cuts = sparse_cuts(row["num_tokens"], Ladder(longest=length, block_size=BLOCK_SIZE), tail_len)
    (spans,) = row["timeline_ms"]
    return [Step(start=start, stop=stop, seconds=(end - begin) / 1e3)
            for (start, stop), (begin, end) in zip(cuts, spans, strict=True)]


def fit_steps(
    steps: Sequence[Step], budgets: NDArray[np.float64], *, stride: int, step_s: float,
    token_s: float,
) -> SparseRates:
    """Fit attention and selection to steps, in relative error.

    Args:
        budgets: of each head of all layers but the last, which attends to nothing in prefill.
        stride: length of DCA's chunks.
        step_s: what every step costs.
        token_s: what a token costs beside attention and selection, all layers.
    """
    used = [step for step in steps if step.stop - step.start > SHORTEST]
    seconds = np.array([step.seconds for step in used])
    sizes = np.array([step.stop - step.start for step in used], dtype=float)
    left = (seconds - step_s - token_s * sizes) / seconds
    counts = [len(budgets) * num_selections(step.start, step.stop, stride) for step in used]
    selections = np.array([(count, count * step.stop)
                           for count, step in zip(counts, used, strict=True)], dtype=float)
    best: tuple[float, SparseRates] | None = None
    for stretch in STRETCHES:
        keys = np.array([kept_keys(budgets, step.start, step.stop, stretch).sum() for step in used])
        terms = np.column_stack([keys, -keys * sizes, selections]) / seconds[:, None]
        scales = np.abs(terms).max(axis=0)  # they differ by 14 orders of magnitude
        found = np.linalg.lstsq(terms / scales, left, rcond=None)[0] / scales
        error = float(np.square(terms @ found - left).sum())
        if best is None or error < best[0]:
            pair_s, shrunk_s, fixed, context = map(float, found)
            best = error, SparseRates(pair_s=pair_s, stretch=stretch, shrink=shrunk_s / pair_s,
                                      selection_s=(fixed, context))
    assert best is not None
    return best[1]
