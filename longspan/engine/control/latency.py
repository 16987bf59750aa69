"""Predicts how long steps take: one model, fitted while serving. Numbers only, no torch.

Three kinds of work, three or four terms each, seconds:

- dense prefill of x tokens after L: ``c + b x + a x (2 L + x)``, linear layers and attention;
- a sparse prefill chunk of x tokens after L: ``c + b x + a x L + s (L + x)``, linear layers and
  kept keys, tile means, and the selection, which looks through the context once for each chunk:
  steps that hold some of a chunk's pieces tell them apart, and chunks of several lengths;
- a short one, such as a prompt's tail, has the same terms and coefficients of its own: most of its
  time goes into selection, and on GPUs into launches, of which long chunks show next to nothing;
- decode of n requests with S tokens in their caches: ``c + b n + a S``.

Recursive least squares in relative error, against a prior that is counted in floating-point
operations and scaled as a whole to the machine's speed. The prior counts like a measurement of each
term (`DOUBT`): a term that is a small part of the steps seen, or that moves with another one in all
of them, stays near it, since what such steps tell of it is their noise. So a short prompt teaches
something about long ones, and nothing absurd. Coefficients that would become negative are held at
zero. A step of several kinds teaches the kind that took most of it; a stray time counts for little,
and a row of them means that the machine has changed. A time can be too long by accident, and never
too short: so a slow first step does not outweigh the fast ones that follow.

A kind that was not measured is its prior, scaled by what the others taught: prefill by the other
prefill and never by decode, which waits for memory where prefill computes; what every step costs,
which a busy machine makes long, apart from the work itself, which it hardly does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import mul
from statistics import fmean
from typing import Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from longspan.engine.control.chunking import Piece, chunk_stop, tail_start
from longspan.engine.control.ladder import Ladder

Terms = tuple[float, float, float]
SparseTerms = tuple[float, float, float, float]
AnyTerms = TypeVar("AnyTerms", Terms, SparseTerms)
Kind = Literal["dense", "sparse", "short", "decode"]
SHORT_CHUNK = 8_192
"""Longest sparse chunk of the kind ``short``, tokens."""
FIRST_PIECES = 3
"""A kind of sparse chunk is known when so many steps were measured: a layer's three sorts of
pieces."""
NOISE = 0.15
"""Relative error of one step's time."""
DOUBT = (10.0, 0.5, 0.5, 2.0)
"""Relative error of the scaled prior's terms; a step's fixed cost and a selection's are hardly
known."""
FORGET = 0.97
"""Weight of what is known after each observation; half is gone after 23 of them."""
SURPRISE = 2.5
"""A time that is off by this factor is a surprise."""
MAX_SURPRISES = 4
"""This many surprises in a row mean that the machine has changed."""
SELECTION_ROWS = 8_192
"""A prior's selection costs as much as the tile means of this many rows. Measured on a CPU; an
H200's costs twice as much."""
DECODE_FITS = 16
"""Decode steps are many and alike: coefficients are fitted again after this many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Coefficients of each kind of work, seconds: (c, b, a), and (c, b, a, s) of sparse prefill,
    ``short`` those of chunks up to `SHORT_CHUNK`; None: there is no difference."""

    dense: Terms = (5e-3, 1e-4, 1e-9)
    sparse: SparseTerms = (5e-3, 3e-4, 1e-9, SELECTION_ROWS * 1e-9)
    decode: Terms = (5e-3, 1e-3, 1e-6)
    short: SparseTerms | None = None

    def of_chunk(self, query_len: float) -> SparseTerms:
        """Return the coefficients of a sparse chunk of so many tokens."""
        return (self.short or self.sparse) if chunk_kind(query_len) == "short" else self.sparse

    def dense_s(self, cached_len: int, query_len: float) -> float:
        """Predict the time of dense prefill after ``cached_len`` tokens, the fixed cost of a step
        included."""
        return _dot(self.dense, dense_terms(cached_len, query_len))

    def sparse_s(self, cached_len: int, query_len: float) -> float:
        """Predict the time of one sparse prefill chunk, the fixed cost of a step included."""
        return _dot(self.of_chunk(query_len), sparse_terms(cached_len, query_len))

    def prefill_s(
        self, start: int, stop: int, *, tail: int | None, ladder: Ladder,
    ) -> float:
        """Predict the time to prefill tokens ``start`` to ``stop - 1`` of a prompt while nothing
        else runs, a chunk a step.

        Args:
            tail: where a sparse prompt's tail starts; None: the prompt is dense.
        """
        total_s = 0.0
        if tail is not None:
            while start < stop:
                end = chunk_stop(start, stop, ladder, tail)
                total_s += self.sparse_s(start, end - start)
                start = end
        if start >= stop:
            return total_s
        num_steps = -(-stop // ladder.longest) - start // ladder.longest
        return self.dense_s(start, stop - start) + (num_steps - 1) * self.dense[0]

    def of_stage(self, num_stages: int) -> Costs:
        """Return what each of several equal stages of layers takes."""
        def share(terms: tuple[float, ...]) -> tuple[float, ...]:
            return terms[0], *(term / num_stages for term in terms[1:])

        return Costs(dense=cast(Terms, share(self.dense)), decode=cast(Terms, share(self.decode)),
                     sparse=cast(SparseTerms, share(self.sparse)),
                     short=cast(SparseTerms, share(self.short)) if self.short else None)

    def decode_s(self, num_requests: int, context_len: int) -> float:
        """Predict the time of one token for each request, with ``context_len`` tokens in their
        caches together."""
        return _dot(self.decode, (1.0, float(num_requests), float(context_len)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The work of one step, in the terms of `Costs`; a kind that is absent is all zeros."""

    dense: Terms = (0.0, 0.0, 0.0)
    sparse: SparseTerms = (0.0, 0.0, 0.0, 0.0)
    short: SparseTerms = (0.0, 0.0, 0.0, 0.0)
    decode: Terms = (0.0, 0.0, 0.0)

    def parts(self, costs: Costs) -> dict[Kind, float]:
        """Predict the time of each kind, seconds."""
        return {"dense": _dot(costs.dense, self.dense), "sparse": _dot(costs.sparse, self.sparse),
                "short": _dot(costs.short or costs.sparse, self.short),
                "decode": _dot(costs.decode, self.decode)}

    def seconds(self, costs: Costs) -> float:
        """Predict the time."""
        return sum(self.parts(costs).values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """An engine's prediction of its own prefill times."""

    costs: Costs
    block_size: int
    prefill_chunk_len: int
    sparse_above: int | None = None
    """Longer prompts prefill sparsely; None: none do."""
    tail_len: int = 0
    """Last tokens of a sparse prompt that are a chunk of their own."""
    num_stages: int = 1
    """Stages of a pipeline: costs are those of the slowest one."""

    def prefill_s(self, start: int, stop: int) -> float:
        """Predict the time to prefill tokens ``start`` to ``stop - 1`` of a prompt of ``stop``
        tokens while nothing else runs, seconds."""
        is_sparse = self.sparse_above is not None and stop > self.sparse_above
        tail = tail_start(stop, self.tail_len, self.block_size) if is_sparse else None
        return self.costs.prefill_s(
            start, stop, tail=tail, ladder=Ladder(
                longest=self.prefill_chunk_len, num_stages=self.num_stages,
                block_size=self.block_size))


def chunk_kind(query_len: float) -> Literal["sparse", "short"]:
    """Name the kind of a sparse chunk of so many tokens."""
    return "short" if query_len <= SHORT_CHUNK else "sparse"


def dense_terms(cached_len: int, query_len: float) -> Terms:
    """Make the terms of one dense prefill slice."""
    return 1.0, query_len, query_len * (2 * cached_len + query_len)


def sparse_terms(cached_len: int, query_len: float) -> SparseTerms:
    """Make the terms of one sparse prefill chunk."""
    return 1.0, query_len, query_len * cached_len, cached_len + query_len


def piece_terms(chunk: SparseTerms, piece: Piece) -> SparseTerms:
    """Make the terms of one of a sparse chunk's pieces."""
    return (1.0, chunk[1] * piece.linear, chunk[2] * piece.attention, chunk[3] * piece.selection)


def chunk_work(query_len: int, terms: SparseTerms) -> Work:
    """Return the work of a step that has these terms of a sparse chunk of so many tokens."""
    return Work(short=terms) if chunk_kind(query_len) == "short" else Work(sparse=terms)


def add_terms(left: AnyTerms, right: AnyTerms) -> AnyTerms:
    """Add terms, with the fixed cost counted once."""
    found = (1.0, *(one + other for one, other in zip(left[1:], right[1:], strict=True)))
    return cast(AnyTerms, found)


class LatencyModel:
    """Predicts how long a step takes; learns from every step seen."""

    def __init__(self, prior: Costs | None = None) -> None:
        self._prior = prior or Costs()
        self.reset()

    @property
    def costs(self) -> Costs:
        """The coefficients now."""
        return self._costs

    def has_seen(self, kind: Kind) -> bool:
        """Tell whether work of this kind was measured."""
        return self._kinds[kind].num_observations > 0

    def knows_chunks(self, query_len: int) -> bool:
        """Tell whether each sort of piece of such sparse chunks can have been measured."""
        return self._kinds[chunk_kind(query_len)].num_observations >= FIRST_PIECES

    def is_near(self, query_len: int, terms: SparseTerms) -> bool:
        """Tell whether a step was seen that had at least half as much work of such a sparse chunk,
        by the prior's proportions: so costs that are wrong fill no step with a whole chunk."""
        return self._kinds[chunk_kind(query_len)].share_seen(terms) >= 0.5

    def reset(self) -> None:
        """Forget what was measured."""
        prior, self.num_observations, self._costs = self._prior, 0, self._prior
        self.dense_reach = 0.0
        """Largest 2 L + x of the dense steps seen: beyond a few times that, costs are a guess."""
        self._kinds: dict[Kind, _Fit] = {
            "dense": _Fit(prior.dense), "sparse": _Fit(prior.sparse),
            "short": _Fit(prior.short or prior.sparse), "decode": _Fit(prior.decode)}

    def observe(self, work: Work, seconds: float) -> None:
        """Learn from a step that took this long."""
        if not 0 < seconds < 1e6:
            return
        parts = {kind: part_s for kind, part_s in work.parts(self._costs).items() if part_s}
        if not parts:
            return
        kind = max(parts, key=lambda name: (self._is_new_chunk(name), parts[name]))
        total_s = sum(parts.values())
        others_s = total_s - parts[kind]
        own_s = seconds * parts[kind] / total_s  # its share, as far as known
        is_proven = others_s < SURPRISE * seconds and all(
            self._kinds[name].num_observations >= DECODE_FITS for name in parts.keys() - {kind})
        if others_s >= seconds and not is_proven:  # they were slow at first: this is the most
            own_s = max(seconds / 2, own_s)
            for name in parts.keys() - {kind}:
                self._learn(name, work, seconds * parts[name] / total_s)
        elif all(self.has_seen(name) for name in parts):
            own_s = max(seconds - others_s, own_s / 2)
        if kind == "dense":
            self.dense_reach = max(self.dense_reach, work.dense[2] / work.dense[1])
        self._learn(kind, work, own_s)
        for name in parts:
            self._kinds[name].reach(getattr(work, name))
        self.num_observations += 1
        self._refresh()

    def _learn(self, kind: Kind, work: Work, seconds: float) -> None:
        self._kinds[kind].observe(getattr(work, kind), seconds, is_rare=kind != "decode")

    def _is_new_chunk(self, kind: Kind) -> bool:
        """Tell whether these are sparse pieces of a kind that is not known yet: what their step
        took teaches that, even where the decodes beside them are predicted to take longer."""
        return (kind in ("sparse", "short")
                and self._kinds[kind].num_observations < FIRST_PIECES)

    def _refresh(self) -> None:
        """Refresh the costs. Kinds that were never seen are slower or faster than their priors by
        as much as the prefills that were; short chunks are no measure for others."""
        kinds: tuple[Kind, ...] = ("dense", "sparse")
        prefills = [self._kinds[kind] for kind in kinds if self.has_seen(kind)]
        fixed, work = (fmean(speeds) for speeds in zip(
            *(fit.speeds() for fit in prefills), strict=True)) if prefills else (1.0, 1.0)
        found = {name: fit.coefficients if fit.num_observations else fit.scaled(fixed, work)
                 for name, fit in self._kinds.items()}
        self._costs = Costs(
            dense=cast(Terms, found["dense"]), sparse=cast(SparseTerms, found["sparse"]),
            short=cast(SparseTerms, found["short"]), decode=cast(Terms, found["decode"]))


class _Fit:
    """Least squares of one kind, and of the prior times the machine's speed."""

    def __init__(self, prior: Sequence[float]) -> None:
        self.coefficients = self._prior = tuple(prior)
        self.num_observations = 0
        self._most = (0.0,) * len(self._prior)
        """The row with the most work, by the prior."""
        self._num_surprises = 0
        self._num_recent = 0
        """Observations since it started again."""
        self._forget_all()

    def speeds(self) -> tuple[float, float]:
        """Seconds by the coefficients over seconds by the prior: of what every step costs, and of
        the work of the largest step seen. Where that tells nothing, it is 1."""
        fixed = self.coefficients[0] / self._prior[0] if self._prior[0] else 1.0
        work_s = _dot(self.coefficients[1:], self._most[1:])
        prior_s = _dot(self._prior[1:], self._most[1:])
        return fixed, work_s / prior_s if work_s and prior_s else 1.0

    def share_seen(self, row: Sequence[float]) -> float:
        """Return the largest step's work over this one's, both by the prior."""
        work_s = _dot(self._prior[1:], row[1:])
        return _dot(self._prior[1:], self._most[1:]) / work_s if work_s else 1.0

    def reach(self, row: Sequence[float]) -> None:
        """Note that a step had such work, whatever it taught."""
        self._most = max(self._most, tuple(row), key=lambda work: _dot(self._prior, work))

    def scaled(self, fixed: float, work: float) -> tuple[float, ...]:
        """Scale the prior to such speeds."""
        return fixed * self._prior[0], *(work * value for value in self._prior[1:])

    def observe(self, row: Sequence[float], seconds: float, *, is_rare: bool) -> None:
        """Learn that work of these terms took this long."""
        expected_s = _dot(self.coefficients, row) if self.num_observations else seconds
        is_surprise = not 1 / SURPRISE < seconds / max(expected_s, 1e-9) < SURPRISE
        self._num_surprises = self._num_surprises + 1 if is_surprise else 0
        has_changed = self._num_surprises >= MAX_SURPRISES
        if has_changed:
            self._forget_all()
            expected_s = seconds
        if is_surprise and self._num_recent < MAX_SURPRISES:
            expected_s = seconds  # the ones before it may have been slow by accident
        # Relative error, of whichever is longer: a stray time counts for little.
        self._add(row, seconds, 1 / max(seconds, expected_s) ** 2)
        self.num_observations += 1
        self._num_recent += 1
        if is_rare or is_surprise or self.num_observations % DECODE_FITS == 1:
            self._solve()

    def _forget_all(self) -> None:
        """Start again: at first, and when the machine has changed."""
        self._num_surprises = 0
        self._num_recent = 0
        count = len(self._prior)
        self._gram = [[0.0] * count for _ in range(count)]
        self._moments = [0.0] * count

    def _add(self, row: Sequence[float], seconds: float, weight: float) -> None:
        for i in range(len(row)):
            self._moments[i] = FORGET * self._moments[i] + weight * row[i] * seconds
            for j in range(len(row)):
                self._gram[i][j] = FORGET * self._gram[i][j] + weight * row[i] * row[j]

    def _solve(self) -> None:
        prior, gram, moments = map(np.array, (self._prior, self._gram, self._moments))
        scaled = float(prior @ moments / (prior @ gram @ prior)) * prior
        # In units of the scaled prior: all terms are about 1.
        pull = (NOISE / np.array(DOUBT[: len(scaled)])) ** 2
        found = scaled * _solve_non_negative(
            gram * np.outer(scaled, scaled) + np.diag(pull), moments * scaled + pull)
        self.coefficients = tuple(map(float, found))


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(map(mul, left, right))


def _solve_non_negative(
    matrix: NDArray[np.float64], right: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Find the best solution that is not negative, by trying every set of terms (15 of four). The
    matrix is positive definite."""
    best, best_gain = np.zeros(len(right)), 0.0
    for size in range(len(right), 0, -1):
        for terms in map(list, combinations(range(len(right)), size)):
            found = np.linalg.solve(matrix[np.ix_(terms, terms)], right[terms])
            gain = float(found @ right[terms])
            if found.min() >= 0 and gain > best_gain:
                best, best_gain = np.zeros(len(right)), gain
                best[terms] = found
    return best
