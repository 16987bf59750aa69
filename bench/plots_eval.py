"""Plots of the evaluation's result files: scores by length, positions, needles, heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.tables_train import AT
from longspan.eval.plot import count_words, draw, draw_legend, draw_lines, file_name, heat_cells
from longspan.eval.plot_fidelity import draw_fidelity

Content = Mapping[str, Any]
Row = Mapping[str, Any]
GROUPS = ("ruler-11", "ruler-retrieval", "ruler-tracking", "ruler-counting")
ASKED_BY_POSITIONS = ("passkey", "niah_multiquery", "niah_multivalue")
"""The three tasks of the report's figure of lengths beyond the training window."""
POSITIONS = ("rope", "dca", "dca+yarn")
ARMS = (*POSITIONS, *(f"{kind}-{positions}" for kind in ("paper", "sparse")
                      for positions in POSITIONS))
"""The order in which tables and plots have them."""
MIN_LENGTHS = 2
"""Fewer lengths make no curve."""


def draw_eval(content: Content, stem: Path) -> list[Path]:
    """Draw what each model's rows suffice for. Returns the files, whose names begin as ``stem``."""
    files = []
    for model in dict.fromkeys(row["model"] for row in content["rows"] if AT not in row["model"]):
        rows = [row for row in content["rows"] if row["model"] == model]
        start = f"{stem.name}.{file_name(model)}"
        for tasks, arms, name in ((GROUPS, ARMS, "ruler"),
                                  (ASKED_BY_POSITIONS, POSITIONS, "positions")):
            file = stem.with_name(f"{start}.{name}.svg")
            files += _draw_tasks(rows, tasks, arms, file)
        files += _draw_needles(rows, stem.with_name(f"{start}.needle.svg"))
    return files


def draw_heads(content: Content, stem: Path) -> list[Path]:
    """Draw the maps and curves of fidelity's rows."""
    return draw_fidelity(content["rows"], stem.parent)


def arms_of(rows: Sequence[Row]) -> list[str]:
    """Return the arms of rows, known ones in their order, then others."""
    found = dict.fromkeys(row["attention"] for row in rows)
    return [arm for arm in ARMS if arm in found] + [arm for arm in found if arm not in ARMS]


def _draw_tasks(
    rows: Sequence[Row], tasks: Sequence[str], arms: Sequence[str], file: Path
) -> list[Path]:
    """Draw a panel for each task, where there are two arms at least over some lengths."""
    scored = [row for row in rows if row["task"] in tasks and row["depth"] is None
              and row["score"] is not None and row["attention"] in arms]
    panels = [task for task in tasks if len({row["num_tokens"] for row in scored
                                             if row["task"] == task}) >= MIN_LENGTHS]
    shown = arms_of([row for row in scored if row["task"] in panels])
    if len(shown) < 2 or (arms == POSITIONS and len(shown) < len(POSITIONS)):
        return []
    with draw(file, (3.3 * len(panels), 3.1)) as figure:
        for number, task in enumerate(panels, 1):
            axes = figure.add_subplot(1, len(panels), number)
            own = [row for row in scored if row["task"] == task]
            draw_lines(axes, own, shown, lambda row: str(row["attention"]))
            axes.set_title(f"{task}, {count_words(own)}", fontsize=8)
            axes.tick_params(labelsize=6.5)
            for label in axes.get_xticklabels():
                label.set_rotation(45)
        figure.axes[0].set_ylabel(f"{scored[0]['model']}: share right", fontsize=8)
        draw_legend(figure)
    return [file]


def _draw_needles(rows: Sequence[Row], file: Path) -> list[Path]:
    """Draw the needle grid of all arms side by side, over the same lengths."""
    cells = [row for row in rows if row["task"] == "needle" and row["depth"] is not None]
    if not cells:
        return []
    arms, lengths = arms_of(cells), sorted({row["num_tokens"] for row in cells})
    with draw(file, (1.2 + (0.9 + 0.36 * len(lengths)) * len(arms), 3.4)) as figure:
        for number, arm in enumerate(arms, 1):
            axes = figure.add_subplot(1, len(arms), number)
            own = [row for row in cells if row["attention"] == arm]
            image = heat_cells(axes, own, lengths)
            axes.set_title(f"{arm}, {count_words(own)} a cell", fontsize=8)
            if number > 1:
                axes.set_yticks([])
        figure.axes[0].set_ylabel("depth of the needle", fontsize=8)
        figure.colorbar(image, ax=figure.axes, label="share right")
    return [file]
