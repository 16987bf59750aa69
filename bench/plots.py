"""Plots of result files, as SVG that changes only when the figures do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.bench.shapes import shape_label
from longspan.errors import MissingDependencyError

STYLES = {"dense": ("#b04a3a", "s"), "sparse": ("#2f6db5", "o")}
"""Colour and marker."""
LINES = ("-", "--", ":", "-.")


def draw_ttft(content: Mapping[str, Any], stem: Path) -> list[Path]:
    """Time to the first token by prompt length, a line for each shape and attention, of plain
    weights and caches.

    Returns the file, if there was anything to draw. Raises `MissingDependencyError` without
    matplotlib.
    """
    lines = ttft_lines(content)
    file = stem.with_name(f"{stem.name}.svg")
    if not lines:
        return []
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "plots need matplotlib, which is not installed: pip install 'longspan[plots]'"
        ) from None
    with rc_context({"svg.hashsalt": "longspan", "font.size": 10}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        shapes = list(dict.fromkeys(shape for shape, _ in lines))
        for (shape, attention), points in lines.items():
            colour, marker = STYLES[attention]
            axes.plot([n for n, _ in points], [s for _, s in points], color=colour, marker=marker,
                      linestyle=LINES[shapes.index(shape) % len(LINES)],
                      label=f"{shape}, {attention}")
        lengths = sorted({n for points in lines.values() for n, _ in points})
        axes.set(xscale="log", yscale="log", xlabel="prompt, tokens",
                 ylabel="time to the first token, s", title=content["device"]["name"])
        axes.set_xticks(lengths, [f"{n / 1000:.0f}K" for n in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None})
    return [file]


def ttft_lines(content: Mapping[str, Any]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """{(shape, attention): [(tokens, seconds)]} of plain weights and caches; of several rows for a
    point the one with most layers, then the slowest."""
    found: defaultdict[tuple[str, str], dict[int, tuple[int, float]]] = defaultdict(dict)
    for row in content["rows"]:
        if "error" not in row and shape_label(row) == row["shape"]:
            points = found[row["shape"], row["attention"]]
            new = row["layers"], row["ttft_scaled_s"]
            points[row["num_tokens"]] = max(points.get(row["num_tokens"], new), new)
    return {key: [(n, points[n][1]) for n in sorted(points)]
            for key, points in sorted(found.items())}
