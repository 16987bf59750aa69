"""Plots of runs, as SVG that changes only when the figures do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longspan.errors import LongspanError, MissingDependencyError

Row = Mapping[str, Any]

COLOURS = ("#b04a3a", "#2f6db5", "#5a8f3c", "#8a5aa8", "#c08a1e", "#4a9a9a")
MARKERS = "soD^vP"
SMALL_N = 20
"""With fewer prompts a cell shows how many were right."""
COLUMNS = 3


def draw_all(summaries: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw every plot that the runs have figures for: heat maps, scores by length, the second run
    against the first. Returns the files.

    Raises `MissingDependencyError` without matplotlib, `LongspanError` when there are no figures.
    """
    rows = [row for summary in summaries for row in summary["rows"]]
    tasks = dict.fromkeys(row["task"] for row in rows if row["depth"] is not None)
    files = []
    for task in tasks:
        for arm in _arms(rows):
            files += _heat_map([row for row in rows if row["task"] == task and _arm(row) == arm],
                               folder)
    files += _curves(rows, folder) + _differences(summaries, folder)
    if not files:
        raise LongspanError("the runs hold no scored sample to plot; run them first")
    return files


def _heat_map(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Score by length and depth of one task in one run."""
    cells = [row for row in rows if row["depth"] is not None]
    if not cells:
        return []
    lengths = sorted({row["num_tokens"] for row in rows if row["num_tokens"]})
    name = f"{rows[0]['task']}.{file_name(_arm(rows[0]))}.heatmap.svg"
    with draw(folder / name, (2.2 + 0.55 * len(lengths), 4.2)) as figure:
        axes = figure.add_subplot()
        image = heat_cells(axes, cells, lengths)
        axes.set_ylabel("depth of the fact")
        axes.set_title(f"{rows[0]['task']}, {_arm(rows[0])}\n(hatched: not run)", fontsize=9)
        figure.colorbar(image, label="share right")
    return [folder / name]


def heat_cells(axes: Any, rows: Sequence[Row], lengths: Sequence[int]) -> Any:
    """Draw one run's scores by length and depth; cells without a row are hatched. Returns the
    image, for a colour bar.

    Args:
        rows: with a depth.
    """
    depths = sorted({row["depth"] for row in rows})
    cells = {(row["num_tokens"], row["depth"]): row for row in rows}
    grid = [[cells[n, d]["score"] if (n, d) in cells else float("nan") for n in lengths]
            for d in depths]
    axes.patch.set(hatch="////", edgecolor="#999999", facecolor="white")
    image = axes.pcolormesh(grid, vmin=0, vmax=1, cmap="cividis", edgecolors="white")
    for (length, depth), row in cells.items():
        if row["n"] < SMALL_N:
            axes.text(lengths.index(length) + 0.5, depths.index(depth) + 0.5,
                      f"{round(row['score'] * row['n'])}/{row['n']}", ha="center", va="center",
                      fontsize=6, color="white" if row["score"] < 0.5 else "black")
    axes.invert_yaxis()
    axes.set_xticks([i + 0.5 for i in range(len(lengths))], map(short_tokens, lengths), fontsize=7)
    axes.set_yticks([i + 0.5 for i in range(len(depths))],
                    [f"{100 * depth:.0f} %" for depth in depths], fontsize=7)
    axes.set_xlabel("prompt, tokens")
    return image


def _curves(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Score by length, a panel for each task and a line for each run."""
    scored = [row for row in rows if row["depth"] is None and row["score"] is not None
              and row["num_tokens"] and 0 <= row["score"] <= 1]
    tasks = list(dict.fromkeys(row["task"] for row in scored))
    if not tasks:
        return []
    height = -(-len(tasks) // COLUMNS)
    file = folder / "scores.svg"
    with draw(file, (4 * min(COLUMNS, len(tasks)), 2.6 * height + 0.6)) as figure:
        for number, task in enumerate(tasks, 1):
            axes = figure.add_subplot(height, min(COLUMNS, len(tasks)), number)
            own = [row for row in scored if row["task"] == task]
            draw_lines(axes, own, _arms(rows), _arm)
            axes.set_title(f"{task}, {count_words(own)}", fontsize=9)
        draw_legend(figure)
    return [file]


def count_words(rows: Sequence[Row]) -> str:
    """Say how many questions rows are of."""
    counts = sorted({row["n"] for row in rows})
    return f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")


def draw_legend(figure: Any) -> None:
    """Explain the lines of all panels once, below them."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=COLUMNS,
                  fontsize=8)


def draw_lines(
    axes: Any, rows: Sequence[Row], arms: Sequence[str], name: Callable[[Row], str]
) -> None:
    """Draw scores with their intervals by length, a line for each arm.

    Args:
        arms: all names that the figure has, so that colours are the same in all panels.
        name: the arm of a row.
    """
    for number, arm in enumerate(arms):
        own = sorted((row for row in rows if name(row) == arm), key=lambda row: row["num_tokens"])
        if not own:
            continue
        lengths = [row["num_tokens"] for row in own]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(lengths, [row["score"] for row in own], color=colour, label=arm, markersize=4,
                  marker=MARKERS[number % len(MARKERS)])
        axes.fill_between(lengths, [row["ci_low"] for row in own],
                          [row["ci_high"] for row in own], color=colour, alpha=0.15, linewidth=0)
    ticks = sorted({row["num_tokens"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, map(short_tokens, ticks), fontsize=7)
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.3)


def _differences(summaries: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw each further run minus the first, by task and length."""
    files = []
    for summary in summaries[1:]:
        cells = _difference_cells(summaries[0]["rows"], summary["rows"])
        if not cells:
            continue
        title = f"{_arm(summary['rows'][0])} minus {_arm(summaries[0]['rows'][0])}"
        tasks = list(dict.fromkeys(task for task, _ in cells))
        lengths = sorted({length for _, length in cells})
        file = folder / f"{file_name(title)}.svg"
        with draw(file, (3 + 0.8 * len(lengths), 1.6 + 0.3 * len(tasks))) as figure:
            axes = figure.add_subplot()
            grid = [[cells.get((task, n), float("nan")) for n in lengths] for task in tasks]
            axes.patch.set(hatch="////", edgecolor="#999999", facecolor="white")
            image = axes.pcolormesh(grid, vmin=-1, vmax=1, cmap="RdBu", edgecolors="white")
            for (task, length), value in cells.items():
                axes.text(lengths.index(length) + 0.5, tasks.index(task) + 0.5,
                          f"{100 * value:+.0f}", ha="center", va="center", fontsize=7)
            axes.invert_yaxis()
            axes.set_xticks([i + 0.5 for i in range(len(lengths))], map(short_tokens, lengths))
            axes.set_yticks([i + 0.5 for i in range(len(tasks))], tasks, fontsize=8)
            axes.set(xlabel="prompt, tokens", title=f"{title}, points")
            figure.colorbar(image)
        files.append(file)
    return files


def _difference_cells(
    first: Sequence[Row], second: Sequence[Row]
) -> dict[tuple[str, int], float]:
    scores = {(row["task"], row["num_tokens"]): row["score"] for row in first
              if row["depth"] is None}
    found = {}
    for row in second:
        cell = (row["task"], row["num_tokens"])
        if row["depth"] is None and row["num_tokens"] and None not in (
                row["score"], scores.get(cell)):
            found[cell] = row["score"] - scores[cell]
    return found


@contextmanager
def draw(file: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Make a figure that is saved at the end."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "plots need matplotlib, which is not installed: pip install 'longspan[plots]'"
        ) from None
    with rc_context({"svg.hashsalt": "longspan", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, metadata={"Date": None})
        except OSError as error:
            raise LongspanError(f"{file}: cannot be written ({error.strerror}); choose another "
                                "folder with --out") from None


def _arm(row: Row) -> str:
    return f"{row['model']}, {row['attention']}"


def _arms(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(_arm(row) for row in rows))


def short_tokens(count: int) -> str:
    """Write a length as a label: 4K, 1M, or all digits."""
    for size, unit in ((2**20, "M"), (10**6, "M"), (2**10, "K")):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"


def file_name(text: str) -> str:
    """Make part of a file name of a text."""
    return "".join(char if char.isalnum() or char in "+-._" else "-" for char in text)
