"""What a folder of rows holds, as JSON and as a plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longspan.errors import MissingDependencyError
from longspan.files.parquet import arrow

QUANTILES = (0.1, 0.5, 0.9, 1.0)


def count_rows(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows, tokens, answers and distances by split, length and task, from the files themselves."""
    groups: defaultdict[tuple[str, int, str], list[list[int]]] = defaultdict(list)
    for file in files:
        split = file.name.split("-")[0]
        table = arrow().parquet.read_table(file, columns=["length", "task", "distances"])
        for row in table.to_pylist():
            groups[split, row["length"], row["task"]].append(row["distances"])
    return [_count(*key, groups[key]) for key in sorted(groups)]


def _count(
    split: str, length: int, task: str, distances: Sequence[Sequence[int]]
) -> dict[str, Any]:
    flat = np.array([d for row in distances for d in row])
    far = flat[flat > 0]
    quantiles = np.quantile(far, QUANTILES).astype(int).tolist() if len(far) else []
    return {
        "split": split, "length": length, "task": task, "num_rows": len(distances),
        "num_tokens": len(distances) * length, "num_answers": len(flat),
        "num_absent": len(flat) - len(far),
        "distances": {f"p{q * 100:.0f}": d for q, d in zip(QUANTILES, quantiles, strict=False)}}


def draw_card(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Tokens by task and length, and how far the answers are, training rows alone. Raises
    `MissingDependencyError` without matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "plots need matplotlib, which is not installed: pip install 'longspan[plots]'"
        ) from None
    chosen = [row for row in rows if row["split"] == "train"]
    tasks = sorted({row["task"] for row in chosen})
    with rc_context({"svg.hashsalt": "longspan", "font.size": 9}):
        figure = Figure(figsize=(9, 1.5 + 0.3 * len(tasks)), layout="constrained")
        tokens, far = figure.subplots(1, 2, sharey=True)
        left = dict.fromkeys(tasks, 0.0)
        for length in sorted({row["length"] for row in chosen}):
            sizes = {row["task"]: row["num_tokens"] / 1e6
                     for row in chosen if row["length"] == length}
            names = list(sizes)
            tokens.barh(names, list(sizes.values()), left=[left[n] for n in names],
                        label=f"{length:,}")
            left.update({name: left[name] + sizes[name] for name in names})
            found = [row for row in chosen if row["length"] == length and row["distances"]]
            far.plot([row["distances"]["p50"] for row in found], [row["task"] for row in found],
                     "o", label=f"{length:,}")
        tokens.set(xlabel="tokens, millions", title="by task and row length")
        far.set(xlabel="tokens to the evidence, median", xscale="log", title="distances")
        tokens.legend(title="row length")
        figure.savefig(file, metadata={"Date": None})
