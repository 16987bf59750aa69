"""Plots of `longspan bench quality`: what each policy answers and keeps, against what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.tables import measured
from bench.tables_quality import pooled
from longspan.eval.plot import COLOURS, MARKERS, draw, draw_legend, file_name, short_tokens

Content = Mapping[str, Any]
Row = Mapping[str, Any]
FAMILIES = {"paper": "paper", "plan": "calibrated plan", "bare": "ours without scouts",
            "tile": "ours", "online": "ours, online", "oracle": "oracle"}
VALUES = (("score", "right answers"), ("kl", "KL to dense, nats"),
          ("recall_typical", "attention mass kept"))
COSTS = (("density", "density, %", 100.0), ("seconds", "prefill, s", 1.0))
"""Field, label, and what it is multiplied by."""


def draw_quality(content: Content, stem: Path) -> list[Path]:
    """Draw answers, KL and recall against density and time, a file for each model, length and kind
    of prompt that has two families of policies at least beside dense. Returns the files."""
    files = []
    cells: dict[tuple[str, int, str, int], list[Row]] = {}
    for row in pooled(measured(content)):
        if row["num_questions"] > 1 and VALUES[1][0] in row:
            cells.setdefault((row["model"], row["num_tokens"], row["place"],
                              row["num_questions"]), []).append(row)
    for (model, num_tokens, place, _), rows in cells.items():
        if len({family(row) for row in rows} - {None}) >= 2:
            files.append(stem.with_name(f"{stem.name}.{file_name(model)}.{num_tokens}.{place}.svg"))
            _draw(rows, f"{model}, {short_tokens(num_tokens)} tokens, questions: {place}",
                  files[-1])
    return files


def family(row: Row) -> str | None:
    """Return which policy a row belongs to; None: dense."""
    kind, _, changes = row["attention"].partition(" ")
    if kind == "tile" and "recall_target=" in changes:
        return "online"
    if kind == "tile" and "num_scouts=0" in changes.split(","):
        return "bare"
    return kind if kind in FAMILIES else None


def _draw(rows: Sequence[Row], title: str, file: Path) -> None:
    costs = [(cost, label, factor) for cost, label, factor in COSTS
             if any(row.get(cost) is not None and family(row) for row in rows)]
    with draw(file, (3.6 * len(costs), 2.4 * len(VALUES) + 0.6)) as figure:
        figure.suptitle(title, fontsize=9)
        panels = figure.subplots(len(VALUES), len(costs), squeeze=False)
        for line, (value, value_label) in enumerate(VALUES):
            for column, (cost, cost_label, factor) in enumerate(costs):
                axes = panels[line][column]
                _panel(axes, rows, cost, factor, value)
                axes.set(xlabel=cost_label if line == len(VALUES) - 1 else "",
                         ylabel=value_label if column == 0 else "")
        draw_legend(figure)


def _panel(
    axes: Any, rows: Sequence[Row], cost: str, factor: float, value: str,
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for number, (name, label) in enumerate(FAMILIES.items()):
        own = sorted((factor * row[cost], row[value]) for row in rows if family(row) == name
                     and row.get(cost) is not None and row.get(value) is not None)
        if own:
            axes.plot(*zip(*own, strict=True), color=COLOURS[number % len(COLOURS)], label=label,
                      marker=MARKERS[number % len(MARKERS)], markersize=4, linewidth=1)
    dense = [row[value] for row in rows if family(row) is None and row.get(value) is not None]
    if dense:
        axes.axhline(dense[0], color="grey", linestyle=":", linewidth=1, label="dense")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
