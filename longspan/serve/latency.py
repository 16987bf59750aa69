"""One model of prefill time, fitted while serving: pure numbers, no torch.

t(L, x) = c + gamma L + b x + a (2 L x + x^2) is the time of a chunk of x tokens after L cached
ones: a step's fixed cost, the choice of sparse patterns over the history, linear layers, attention.
Recursive least squares in relative error, started from a prior; coefficients that would become
negative are held at zero by solving again without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

Coefficients = tuple[float, float, float, float]
PRIOR: Coefficients = (5e-3, 1e-8, 1e-4, 1e-10)
"""Seconds: a step, a token of history, a token, a pair of tokens; a small machine's figures."""
PRIOR_WEIGHT = 0.1
"""Observations that the prior counts for, at each of the places where it is asked."""
FORGET = 0.97
"""Weight of what is known after each observation; half is gone after 23 of them."""
NUM_TERMS = 4


class LatencyModel:
    """Predicts how long a prefill takes; learns from every chunk seen."""

    def __init__(self, prior: Coefficients = PRIOR) -> None:
        self.coefficients: Coefficients = prior
        self.num_observations = 0
        self._gram = [[0.0] * NUM_TERMS for _ in range(NUM_TERMS)]
        self._moments = [0.0] * NUM_TERMS
        for history, chunk in ((0, 128), (0, 8192), (65536, 8192), (1 << 20, 32768)):
            self._add(history, chunk, _dot(prior, _features(history, chunk)), PRIOR_WEIGHT)

    def observe(self, history: int, chunk: int, seconds: float) -> None:
        """A chunk of ``chunk`` tokens after ``history`` tokens took this long."""
        if chunk <= 0 or history < 0 or not 0 < seconds < 1e6:
            return
        self._decay()
        self._add(history, chunk, seconds, 1.0)
        self.num_observations += 1
        self.coefficients = _solve_non_negative(self._gram, self._moments)

    def chunk_s(self, history: int, chunk: int) -> float:
        """Time of one chunk, seconds."""
        return _dot(self.coefficients, _features(history, chunk))

    def prefill_s(self, start: int, stop: int, chunk_len: int) -> float:
        """Time to prefill tokens ``start`` to ``stop - 1`` in chunks of ``chunk_len``, seconds."""
        return prefill_s(self.coefficients, start, stop, chunk_len)

    def _decay(self) -> None:
        self._moments = [value * FORGET for value in self._moments]
        self._gram = [[value * FORGET for value in row] for row in self._gram]

    def _add(self, history: int, chunk: int, seconds: float, weight: float) -> None:
        """A tenth too much counts the same for short and long chunks, and a stray slow one (the
        first of a process, say) for less than the many that agree with the model."""
        row = _features(history, chunk)
        weight /= seconds * max(_dot(self.coefficients, row), 1e-9)
        for i in range(NUM_TERMS):
            self._moments[i] += weight * row[i] * seconds
            for j in range(NUM_TERMS):
                self._gram[i][j] += weight * row[i] * row[j]


def prefill_s(coefficients: Coefficients, start: int, stop: int, chunk_len: int) -> float:
    """Sum of t(L, x) over the chunks, in closed form, seconds."""
    if stop <= start:
        return 0.0
    c, gamma, b, a = coefficients
    count = -(-(stop - start) // chunk_len)
    histories = count * start + chunk_len * count * (count - 1) // 2
    return c * count + gamma * histories + b * (stop - start) + a * (stop * stop - start * start)


def _features(history: int, chunk: int) -> tuple[float, float, float, float]:
    return 1.0, float(history), float(chunk), float(chunk) * (2 * history + chunk)


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))


def _solve_non_negative(gram: list[list[float]], moments: list[float]) -> Coefficients:
    """The best coefficients that are not negative: tries every set of terms (there are 15)."""
    best, best_gain = [0.0] * NUM_TERMS, 0.0
    for size in range(NUM_TERMS, 0, -1):
        for terms in combinations(range(NUM_TERMS), size):
            found = _solve([[gram[i][j] for j in terms] for i in terms],
                           [moments[i] for i in terms])
            if found is None or min(found) < 0:
                continue
            gain = sum(x * moments[i] for x, i in zip(found, terms, strict=True))
            if gain > best_gain:
                best_gain, best = gain, [0.0] * NUM_TERMS
                for x, i in zip(found, terms, strict=True):
                    best[i] = x
    return best[0], best[1], best[2], best[3]


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Cholesky with unit diagonal, since the terms differ by twelve powers of ten; None when
    singular."""
    size = len(right)
    scale = [matrix[i][i] ** 0.5 for i in range(size)]
    if not all(scale):
        return None
    lower = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[i][j] / (scale[i] * scale[j]) - _dot(lower[i][:j], lower[j][:j])
            if i != j:
                lower[i][j] = rest / lower[j][j]
            elif rest <= 1e-12:
                return None
            else:
                lower[i][i] = rest**0.5
    half = list[float]()
    for i in range(size):
        half.append((right[i] / scale[i] - _dot(lower[i][:i], half)) / lower[i][i])
    result = [0.0] * size
    for i in reversed(range(size)):
        done = sum(lower[k][i] * result[k] for k in range(i + 1, size))
        result[i] = (half[i] - done) / lower[i][i]
    return [x / s for x, s in zip(result, scale, strict=True)]
