"""Two runs on the same prompts, task by task and length by length."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from longspan.errors import LongspanError
from longspan.eval.samples import Sample
from longspan.eval.stats import Comparison, Estimate, combine, compare, nats_estimate
from longspan.eval.task import Task
from longspan.eval.tasks.registry import MACROS

TASK_MARGIN = 0.05
"""The second run may lose so much on a task before it counts as worse."""
MACRO_MARGIN = 0.02
"""The same for the mean of a group of tasks."""


def compare_runs(
    first: Mapping[str, Sample], second: Mapping[str, Sample], tasks: Mapping[str, Task],
    margin: float = TASK_MARGIN,
) -> list[dict[str, Any]]:
    """Return one row for each task and length that both runs answered, and for each group of tasks
    at each length: second minus first.

    Raises `LongspanError` where they have no prompt in common.
    """
    pairs = _pairs(first, second)
    if not pairs:
        raise LongspanError("the two runs have no answered prompt in common; run both with the "
                            "same tasks, lengths, seed, tokenizer and haystacks")
    found = {}
    rows = []
    for (name, length), samples in pairs.items():
        scores = np.array([[one.score, other.score] for one, other in samples], float)
        result = compare(scores[:, 0].tolist(), scores[:, 1].tolist(), tasks[name].is_binary,
                         [one.index for one, _ in samples])
        found[name, length] = (scores, result)
        verdict = result.verdict(margin) if tasks[name].scores_text else ""  # nats have no margin
        rows.append({"task": name, "num_tokens": length, **_figures(scores.mean(0), result),
                     "p_value": round(result.p_value, 6), "method": result.method,
                     "verdict": verdict, **_surprise(samples)})
    return rows + _macro_rows(found)


def _surprise(pairs: Sequence[tuple[Sample, Sample]]) -> dict[str, Any]:
    """Return how many nats a token the second run finds right answers less likely, where both
    scored them."""
    both = [(one.answer_nll, other.answer_nll, one.index) for one, other in pairs
            if one.answer_nll is not None and other.answer_nll is not None]
    if not both:
        return {}
    found = nats_estimate([second - first for first, second, _ in both],
                          [document for *_, document in both])
    has_interval = bool(found.method)
    return {"nll_n": found.n, "nll_difference": round(found.mean, 4),
            "nll_ci_low": round(found.low, 4) if has_interval else None,
            "nll_ci_high": round(found.high, 4) if has_interval else None}


def _figures(means: np.ndarray, result: Comparison) -> dict[str, Any]:
    return {"n": result.n, "first": round(float(means[0]), 4), "second": round(float(means[1]), 4),
            "difference": round(result.difference, 4), "ci_low": round(result.low, 4),
            "ci_high": round(result.high, 4), "num_better": result.num_better,
            "num_worse": result.num_worse}


def _macro_rows(
    found: Mapping[tuple[str, int | None], tuple[np.ndarray, Comparison]]
) -> list[dict[str, Any]]:
    """Return the differences of macro scores, where all tasks of a group were compared."""
    rows = []
    for name, members in MACROS.items():
        for length in sorted({n for task, n in found if task in members and n is not None}):
            if not all((task, length) in found for task in members):
                continue
            parts = [found[task, length] for task in members]
            results = [result for _, result in parts]
            whole = combine([Estimate(result.difference, result.low, result.high, result.n, "")
                             for result in results], [1 / len(parts)] * len(parts))
            total = Comparison(
                whole.n, whole.mean, whole.low, whole.high, sum(r.num_better for r in results),
                sum(r.num_worse for r in results), math.nan, "combined")
            means = np.mean([scores.mean(0) for scores, _ in parts], 0)
            rows.append({"task": name, "num_tokens": length, **_figures(means, total),
                         "p_value": None, "method": total.method,
                         "verdict": total.verdict(MACRO_MARGIN)})
    return rows


def _pairs(
    first: Mapping[str, Sample], second: Mapping[str, Sample]
) -> dict[tuple[str, int | None], list[tuple[Sample, Sample]]]:
    """Return the answered prompts of both runs, by task and length.

    Raises `LongspanError` if a key stands for different prompts.
    """
    pairs: defaultdict[tuple[str, int | None], list[tuple[Sample, Sample]]] = defaultdict(list)
    for key, one in first.items():
        other = second.get(key)
        if other is None or one.score is None or other.score is None:
            continue
        if one.ids_sha256 != other.ids_sha256:
            raise LongspanError(f"{key}: the two runs asked different prompts (other tokenizer, "
                                "haystacks or version); compare runs that asked the same")
        pairs[one.task, one.num_tokens].append((one, other))
    return dict(pairs)
