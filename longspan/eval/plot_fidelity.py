"""Plots of `longspan eval fidelity`: per-head maps, and nats by position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longspan.eval.plot import COLOURS, MARKERS, draw, file_name, short_tokens

Row = Mapping[str, Any]
MAPS = (("recall_by_head", "attention mass kept"), ("output_error_by_head", "output error"))


def draw_fidelity(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw the maps of every arm at its longest length, and nats by position of all arms.

    Returns the files. Raises `MissingDependencyError` without matplotlib.
    """
    files = []
    for row in _longest(row for row in rows if "recall_by_head" in row):
        files.append(folder / f"fidelity.{file_name(row['model'])}.{file_name(row['attention'])}"
                              ".heads.svg")
        _maps(row, files[-1])
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in _longest(row for row in rows if row["model"] == model)
               if not row["attention"].endswith("floor")]
        if own:
            files.append(folder / f"fidelity.{file_name(model)}.positions.svg")
            _positions(own, files[-1])
    return files


def _longest(rows: Iterator[Row]) -> list[Row]:
    """Return each arm's row over the most tasks at its longest length."""
    found: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda row: (row["num_tokens"], row["n"])):
        found[row["model"], row["attention"]] = row
    return list(found.values())


def _maps(row: Row, file: Path) -> None:
    layers, heads = np.shape(row["recall_by_head"])
    width, height = max(2.6, 0.28 * heads + 1.2), max(2.6, 0.2 * layers + 1.0)
    with draw(file, (2 * width, height + 0.5)) as figure:
        figure.suptitle(f"{row['model']}, {row['attention']}, {row['num_tokens']:,} tokens, "
                        f"{row['n']} texts", fontsize=9)
        for number, (name, title) in enumerate(MAPS, 1):
            axes = figure.add_subplot(1, 2, number)
            values = np.array(row[name])
            is_recall = name == "recall_by_head"
            image = axes.pcolormesh(
                values, cmap="cividis" if is_recall else "cividis_r", vmin=0,
                vmax=1 if is_recall else max(1e-9, float(values.max())), edgecolors="white",
                linewidth=0.3)
            axes.invert_yaxis()
            axes.set_aspect("auto")
            axes.set_xticks([i + 0.5 for i in _few(heads)], [str(i) for i in _few(heads)])
            axes.set_yticks([i + 0.5 for i in _few(layers)], [str(i) for i in _few(layers)])
            axes.set(xlabel="head", ylabel="layer" if number == 1 else "")
            axes.set_title(title, fontsize=9)
            figure.colorbar(image)


def _few(count: int) -> list[int]:
    """Return at most eight evenly spaced numbers below a count, 0 among them."""
    return list(range(0, count, -(-count // 8)))


def _positions(rows: Sequence[Row], file: Path) -> None:
    with draw(file, (5.5, 3.4)) as figure:
        axes = figure.add_subplot()
        for number, row in enumerate(rows):
            points = sorted((int(name.partition("-")[2]), nats)
                            for name, nats in row["nats_by_position"].items())
            axes.plot([place for place, _ in points], [nats for _, nats in points],
                      color=COLOURS[number % len(COLOURS)], markersize=4,
                      marker=MARKERS[number % len(MARKERS)], label=row["attention"])
        ticks = sorted({int(name.partition("-")[2]) for row in rows
                        for name in row["nats_by_position"]})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, map(short_tokens, ticks), fontsize=7)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set(xlabel="positions up to, tokens", ylabel="nats a token")
        axes.set_title(f"{rows[0]['model']}: {rows[0]['task']} texts, {rows[0]['n']} each",
                       fontsize=9)
        axes.legend(fontsize=8)
