"""Rows of `bench/effects.sh`: what each part of the recipe brings, over several seeds.

    python -m bench.effects RUNS --results bench/results

RUNS holds a folder ``EFFECT/ARM/SEED`` of `longspan eval run` for each trained model; an effect's
two arms were trained on as many tokens. Per task and length: the score of each arm (the mean over
seeds), their mean difference seed by seed, and its 95 % interval by Student's t.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from longspan.commands.results import write_rows
from longspan.data.lines import read_lines
from longspan.errors import LongspanError

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % for 1, 2, 3 ... degrees of freedom."""
Cell = tuple[str, int]
"""Task and length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """Two ways to train."""

    name: str
    without: str
    with_it: str


EFFECTS: Mapping[str, Effect] = {
    "synthetic": Effect(name="synthetic tasks", without="text alone", with_it="half of it tasks"),
    "sft": Effect(name="second stage of fine-tuning", without="short rows",
                  with_it="short and long rows"),
    "dpo": Effect(name="preferences of 8,192 tokens", without="before", with_it="after")}
"""By the folder; its arms are ``without`` and ``with``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.effects", description=__doc__)
    parser.add_argument("runs", type=Path, help="folder that bench/effects.sh wrote")
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="folder")
    parser.add_argument("--device", default="cuda", help="cpu or cuda: what it ran on")
    asked = parser.parse_args(arguments)
    try:
        rows = [row for name in EFFECTS for row in effect_rows(asked.runs, name)]
        if not rows:
            raise LongspanError(f"{asked.runs}: no effect has two seeds of both arms there; run "
                                "bench/effects.sh first")
        print(write_rows(asked.results, "effects", rows, asked.device))
    except LongspanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def effect_rows(runs: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of an effect: of the seeds that have both arms, two at least."""
    arms = {arm: seed_scores(runs / name / arm) for arm in ("without", "with")}
    effect, rows = EFFECTS[name], []
    cells = sorted({cell for scores in arms.values() for one in scores.values() for cell in one})
    for cell in cells:
        seeds = [seed for seed, scores in arms["with"].items()
                 if cell in scores and cell in arms["without"].get(seed, {})]
        if len(seeds) < 2:
            continue
        pairs = [(arms["without"][seed][cell], arms["with"][seed][cell]) for seed in seeds]
        differences = [after[0] - before[0] for before, after in pairs]
        mean, low, high = interval(differences)
        rows.append({
            "effect": effect.name, "task": cell[0], "num_tokens": cell[1],
            "without": effect.without, "with": effect.with_it,
            "without_score": round(fmean(before[0] for before, _ in pairs), 4),
            "with_score": round(fmean(after[0] for _, after in pairs), 4),
            "difference": round(mean, 4), "ci_low": round(low, 4), "ci_high": round(high, 4),
            "num_seeds": len(seeds), "num_questions": min(n for pair in pairs for _, n in pair),
            "differences": [round(difference, 4) for difference in differences]})
    return rows


def seed_scores(arm: Path) -> dict[str, dict[Cell, tuple[float, int]]]:
    """Return {seed: {(task, length): (score, questions)}} of the runs of an arm."""
    found: dict[str, dict[Cell, tuple[float, int]]] = {}
    for folder in sorted(arm.iterdir()) if arm.is_dir() else ():
        scores: defaultdict[Cell, list[float]] = defaultdict(list)
        for file in sorted(folder.rglob("samples.jsonl")):
            for sample in read_lines(file):
                if sample.get("score") is not None:
                    scores[sample["task"], sample["num_tokens"]].append(sample["score"])
        found[folder.name] = {cell: (fmean(own), len(own)) for cell, own in scores.items()}
    return found


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % interval."""
    mean = fmean(differences)
    half = T_95[min(len(differences) - 2, len(T_95) - 1)] * stdev(differences) / len(
        differences) ** 0.5
    return mean, mean - half, mean + half


if __name__ == "__main__":
    sys.exit(main())
