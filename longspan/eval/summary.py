"""Result rows out of samples: a score for every task and length, macro scores, areas under curves.

Shares are from 0 to 1. Every row carries n and a 95 % interval. What the plan asks for and no
sample answers is a row without a score, never a zero and never left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from longspan.eval.samples import Sample
from longspan.eval.stats import Estimate, combine, curve_weights, estimate, nats_estimate
from longspan.eval.task import Task
from longspan.eval.tasks.registry import MACROS, RULER_11

NUM_DEPTH_BINS = 10
AREA_TASKS = (*MACROS, "passkey", "needle")
FIRST_LEN, LAST_LEN = 4096, 1_048_576
"""The area under a score-length curve is meant to reach from here to there."""
Cell = tuple[str, int | None]


@dataclass(frozen=True, slots=True)
class Arm:
    """What all rows of a run share."""

    model: str
    attention: str
    """Attention and positions, or the address of an endpoint."""
    about: Mapping[str, Any]
    """Further columns: haystack, whether it is held out."""


def summarise(
    arm: Arm, planned: Mapping[str, Mapping[str, int]], samples: Iterable[Sample],
    tasks: Mapping[str, Task],
) -> dict[str, Any]:
    """Summarise a run in rows and areas.

    Args:
        planned: {task: {length, or ``data``: n}}.
        tasks: those of the plan, by name.
    """
    groups: defaultdict[Cell, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.task, sample.num_tokens].append(sample)
    rows, estimates = [], dict[Cell, Estimate]()
    for name, cells in planned.items():
        for length, n in cells.items():
            cell = (name, None if length == "data" else int(length))
            good, found = _estimate(groups[cell], tasks[name])
            if found is not None:
                estimates[cell] = found
            rows.append(_row(arm, cell, n, groups[cell], good, found))
            rows += _depth_rows(arm, cell, good) if tasks[name].by_depth else []
    rows += _macro_rows(arm, planned, estimates, groups)
    return {"rows": rows, "areas": _areas(arm, rows, estimates)}


def _estimate(samples: Sequence[Sample], task: Task) -> tuple[list[Sample], Estimate | None]:
    """Return (scored samples, their score if there are any)."""
    good = _scored(samples)
    if not good:
        return good, None
    scores = [sample.score for sample in good if sample.score is not None]
    return good, estimate(scores, task.is_binary, [sample.index for sample in good])


def _scored(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.status == "ok" and sample.score is not None]


def _row(
    arm: Arm, cell: Cell, planned: int, samples: Sequence[Sample], good: Sequence[Sample],
    found: Estimate | None,
) -> dict[str, Any]:
    row = {**_head(arm, cell), "depth": None, **_figures(found), "num_planned": planned,
           "num_documents": len({sample.index for sample in good}),
           "status": _status(samples, len(good), planned), **_costs(good),
           **_surprise([good]), **_prompts(good)}
    labels = Counter(sample.label for sample in good if sample.label)
    names = sorted({name for sample in good for name in sample.values})
    values = {name: round(fmean(sample.values[name] for sample in good if name in sample.values), 4)
              for name in sorted(names, key=_leading_number)}
    return {**row, **({"labels": dict(sorted(labels.items()))} if labels else {}),
            **({"values": values} if values else {})}


def _status(samples: Sequence[Sample], num_good: int, planned: int) -> str:
    """Return ``complete``, or what is missing and why."""
    if num_good >= planned:
        return "complete"
    missing = Counter(sample.status for sample in samples if sample.status != "ok")
    missing["not judged"] = sum(s.status == "ok" and s.score is None for s in samples)
    missing["not run"] = planned - num_good - sum(missing.values())
    return ", ".join(f"{count} {name}" for name, count in missing.items() if count > 0)


def _head(arm: Arm, cell: Cell) -> dict[str, Any]:
    return {"model": arm.model, "task": cell[0], "num_tokens": cell[1], "attention": arm.attention,
            **arm.about}


def _figures(found: Estimate | None) -> dict[str, Any]:
    if found is None:
        return {"n": 0, "score": None, "ci_low": None, "ci_high": None, "method": None}
    return {"n": found.n, "score": round(found.mean, 4), "ci_low": round(found.low, 4) + 0.0,
            "ci_high": round(found.high, 4), "method": found.method}


def _costs(samples: Sequence[Sample]) -> dict[str, Any]:
    # Follow-up questions compute a few tokens only: costs are those of whole prefills.
    fresh = [sample for sample in samples if not sample.num_cached_tokens]
    densities = [sample.density for sample in fresh if sample.density is not None]
    times = [sample.ttft_s for sample in fresh if sample.ttft_s is not None]
    return {"density": round(fmean(densities), 4) if densities else None,
            "ttft_s": round(median(times), 4) if times else None, "ttft_n": len(times)}


def _surprise(tasks: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """Return nats a token of the right answers, the mean of task means, where every task has
    some."""
    found = [[(sample.answer_nll, sample.index) for sample in samples
              if sample.answer_nll is not None] for samples in tasks]
    if not all(found):
        return {}
    parts = [nats_estimate([nats for nats, _ in each], [index for _, index in each])
             for each in found]
    whole = combine(parts, [1 / len(parts)] * len(parts)) if len(parts) > 1 else parts[0]
    has_interval = all(part.method for part in parts)
    return {"answer_nll": round(whole.mean, 4),
            "answer_nll_low": round(whole.low, 4) if has_interval else None,
            "answer_nll_high": round(whole.high, 4) if has_interval else None,
            "answer_nll_n": whole.n}


def _prompts(samples: Sequence[Sample]) -> dict[str, Any]:
    lengths = [sample.prompt_tokens for sample in samples]
    forms = sorted({sample.form for sample in samples if sample.form})
    return {"prompt_tokens": round(fmean(lengths)) if lengths else None,
            **({"form": "; ".join(forms)} if forms else {})}


def _depth_rows(arm: Arm, cell: Cell, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return the scores by depth: that of a grid, else the middle of each tenth of the document."""
    groups: defaultdict[float, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.depth is not None and sample.score is not None:
            groups[_depth(sample, sample.depth)].append(sample.score)
    return [{**_head(arm, cell), "depth": depth, **_figures(estimate(groups[depth], True))}
            for depth in sorted(groups)]


def _depth(sample: Sample, depth: float) -> float:
    on_grid = sample.facts.get("depth")
    if on_grid is not None:
        return float(on_grid)
    return (min(int(depth * NUM_DEPTH_BINS), NUM_DEPTH_BINS - 1) + 0.5) / NUM_DEPTH_BINS


def _macro_rows(
    arm: Arm, planned: Mapping[str, Mapping[str, int]], estimates: dict[Cell, Estimate],
    groups: Mapping[Cell, Sequence[Sample]],
) -> list[dict[str, Any]]:
    """Return the means of task means at each length, of groups of which any task was planned. A
    group is without a score where one of its tasks is."""
    rows = []
    for name, members in MACROS.items():
        if name == "ruler-13" and not set(planned) & (set(members) - set(RULER_11)):
            continue
        for length in sorted({int(n) for task in members for n in planned.get(task, ())}):
            missing = [task for task in members if (task, length) not in estimates]
            found, more = None, dict[str, Any]()
            if missing:
                more = {"status": f"{len(missing)} of {len(members)} tasks not run",
                        "missing": missing}
            else:
                parts = [estimates[task, length] for task in members]
                found = combine(parts, [1 / len(parts)] * len(parts))
                estimates[name, length] = found
                good = [_scored(groups[task, length]) for task in members]
                more = {"status": "complete", **_costs([s for each in good for s in each]),
                        **_surprise(good)}
            rows.append({**_head(arm, (name, length)), "depth": None, **_figures(found), **more})
    return rows


def _areas(
    arm: Arm, rows: Sequence[Mapping[str, Any]], estimates: Mapping[Cell, Estimate]
) -> list[dict[str, Any]]:
    """Return the area under the score-length curve, over the lengths that were measured, and which
    those are: only from 4,096 to 1,048,576 tokens it is the one number that sums a model up."""
    found = []
    names = dict.fromkeys(row["task"] for row in rows if row["depth"] is None)
    for name in [name for name in names if name in AREA_TASKS]:
        lengths = sorted(length for task, length in estimates
                         if task == name and length is not None)
        if len(lengths) < 2:
            continue
        area = combine([estimates[name, length] for length in lengths], curve_weights(lengths))
        is_whole = lengths[0] <= FIRST_LEN and lengths[-1] >= LAST_LEN
        found.append({"model": arm.model, "attention": arm.attention, "task": name,
                      "first_len": lengths[0], "last_len": lengths[-1],
                      "num_lengths": len(lengths), **_figures(area),
                      "status": "complete" if is_whole else
                      f"measured from {lengths[0]:,} to {lengths[-1]:,} tokens only"})
    return found


def _leading_number(name: str) -> tuple[int, str]:
    digits = name.partition("-")[0]
    return (int(digits) if digits.isdigit() else 0, name)
