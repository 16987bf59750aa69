"""One model of prefill time, fitted while serving: pure numbers, no torch.

t(L, x) = c + gamma L + b x + a (2 L x + x^2) is the time of a chunk of x tokens after L cached
ones: a step's fixed cost, the choice of sparse patterns over the history, linear layers, attention.

Recursive least squares in relative error. What the observations leave open is taken from a prior,
scaled as a whole to the machine's speed: a short prompt teaches something about long ones.
Coefficients that would become negative are held at zero by solving again without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

Coefficients = tuple[float, float, float, float]
PRIOR: Coefficients = (5e-3, 1e-8, 1e-4, 1e-10)
"""Seconds: a step, a token of history, a token, a pair of tokens; a small machine's figures."""
PULL = 0.01
"""Towards the scaled prior, as a share of the information that there is on each term."""
FORGET = 0.97
"""Weight of what is known after each observation; half is gone after 23 of them."""
SURPRISE = 2.5
"""A time that is off by this factor is a surprise ..."""
MAX_SURPRISES = 4
"""... and so many in a row mean that the machine has changed."""
NUM_TERMS = 4


class LatencyModel:
    """Predicts how long a prefill takes; learns from every chunk seen."""

    def __init__(self, prior: Coefficients = PRIOR) -> None:
        self.coefficients: Coefficients = prior
        self.num_observations = 0
        self._prior = prior
        self._num_surprises = 0
        self._forget_all()

    def observe(self, history: int, chunk: int, seconds: float) -> None:
        """A chunk of ``chunk`` tokens after ``history`` tokens took this long."""
        if chunk <= 0 or history < 0 or not 0 < seconds < 1e6:
            return
        expected_s = self.chunk_s(history, chunk) if self.num_observations else seconds
        is_surprise = not 1 / SURPRISE < seconds / max(expected_s, 1e-9) < SURPRISE
        self._num_surprises = self._num_surprises + 1 if is_surprise else 0
        if self._num_surprises >= MAX_SURPRISES:
            self._forget_all()
            expected_s = seconds
        # Relative error, of whichever is longer: a stray time counts for little.
        self._add(_features(history, chunk), seconds, 1 / max(seconds, expected_s) ** 2)
        self.num_observations += 1
        self.coefficients = self._fit()

    def chunk_s(self, history: int, chunk: int) -> float:
        """Time of one chunk, seconds."""
        return _dot(self.coefficients, _features(history, chunk))

    def prefill_s(self, start: int, stop: int, chunk_len: int) -> float:
        """Time to prefill tokens ``start`` to ``stop - 1`` in chunks of ``chunk_len``, seconds."""
        return prefill_s(self.coefficients, start, stop, chunk_len)

    def _forget_all(self) -> None:
        """Start again: at first, and when the machine has changed."""
        self._num_surprises = 0
        self._gram = [[0.0] * NUM_TERMS for _ in range(NUM_TERMS)]
        self._moments = [0.0] * NUM_TERMS

    def _add(self, row: Sequence[float], seconds: float, weight: float) -> None:
        for i in range(NUM_TERMS):
            self._moments[i] = FORGET * self._moments[i] + weight * row[i] * seconds
            for j in range(NUM_TERMS):
                self._gram[i][j] = FORGET * self._gram[i][j] + weight * row[i] * row[j]

    def _fit(self) -> Coefficients:
        """Least squares with a pull towards the prior times the machine's speed."""
        gram, prior = self._gram, self._prior
        speed = _dot(prior, self._moments) / _dot(prior, [_dot(row, prior) for row in gram])
        scaled = [speed * value for value in prior]
        known = [i for i in range(NUM_TERMS) if gram[i][i] > 0]
        matrix = [[gram[i][j] * (1 + PULL * (i == j)) for j in known] for i in known]
        right = [self._moments[i] + PULL * gram[i][i] * scaled[i] for i in known]
        for i, value in zip(known, _solve_non_negative(matrix, right), strict=True):
            scaled[i] = value
        return scaled[0], scaled[1], scaled[2], scaled[3]


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


def _solve_non_negative(matrix: list[list[float]], right: list[float]) -> list[float]:
    """The best solution that is not negative: tries every set of terms (there are 15)."""
    count = len(right)
    best, best_gain = [0.0] * count, 0.0
    for size in range(count, 0, -1):
        for terms in combinations(range(count), size):
            found = _solve([[matrix[i][j] for j in terms] for i in terms],
                           [right[i] for i in terms])
            if found is None or min(found) < 0:
                continue
            gain = sum(x * right[i] for x, i in zip(found, terms, strict=True))
            if gain > best_gain:
                best_gain, best = gain, [0.0] * count
                for x, i in zip(found, terms, strict=True):
                    best[i] = x
    return best


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
