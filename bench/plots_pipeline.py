"""Plots of several GPUs, as SVG that changes only when the figures do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.pipeline_rows import Row, measured_rows
from longspan.bench.pipeline.simulate import BEST
from longspan.errors import MissingDependencyError

LONGEST = 1_000_000
KINDS = (("cp", BEST, "#2f6db5", "o"), ("pp", "", "#b04a3a", "s"),
         ("tp", BEST, "#4b8b3b", "^"))
"""Which ranks share the work, plan (none: planned or ladder), colour, marker."""
MOST_TIMELINES = 14
COLOURS = ("#2f6db5", "#9cbfe6")
"""Chunks alternate, so that they can be told apart."""


def draw_pipeline(content: Mapping[str, Any], stem: Path) -> list[Path]:
    """Draw the speed-up by number of GPUs, and what each stage does when.

    Returns the files. Raises `MissingDependencyError` without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "plots need matplotlib, which is not installed: pip install 'longspan[plots]'"
        ) from None
    files = []
    with rc_context({"svg.hashsalt": "longspan", "font.size": 9}):
        for name, draw in (("speedup", _draw_speedup), ("timeline", _draw_timelines)):
            figure = Figure(layout="constrained")
            rows = [*measured_rows(content["rows"]), *(
                row for row in content["rows"] if row["source"] == "simulated")]
            if draw(figure, rows, content["device"]["name"]):
                file = stem.with_name(f"{stem.name}.{name}.svg")
                file.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(file, metadata={"Date": None})
                files.append(file)
    return files


def _draw_speedup(figure: Any, rows: Sequence[Row], title: str) -> bool:
    panels = list(dict.fromkeys((row["shape"], row["attention"]) for row in rows
                                if row["num_tokens"] == LONGEST and "speedup" in row))
    if not panels:
        return False
    figure.set_size_inches(max(6.0, 4 * len(panels) / 2), 6)
    figure.suptitle(f"{title}: {LONGEST:,} tokens, speed-up over one GPU")
    for index, (shape, attention) in enumerate(panels):
        axes = figure.add_subplot(2, -(-len(panels) // 2), index + 1)
        for kind, plan, colour, marker in KINDS:
            wanted = plan or ("ladder" if attention == "sparse" else "planned")
            points = {row[kind]: row["speedup"] for row in rows if (
                row["shape"], row["attention"], row["num_tokens"], row["plan"]) == (
                shape, attention, LONGEST, wanted) and row[kind] > 1 and "speedup" in row
                and row[kind] == row["cp"] * row["pp"] * row["tp"]}
            if points:
                axes.plot(*zip(*sorted(points.items()), strict=True), color=colour, marker=marker,
                          label=kind)
        counts = sorted({row["cp"] * row["pp"] * row["tp"] for row in rows})
        axes.plot(counts, counts, color="#999999", linestyle=":", label="ideal")
        axes.set(title=f"{shape}, {attention}", xlabel="GPUs", xscale="log", yscale="log")
        axes.set_xticks(counts, map(str, counts))
        axes.set_yticks(counts, map(str, counts))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    return bool(panels)


def _draw_timelines(figure: Any, rows: Sequence[Row], title: str) -> bool:
    shown = [row for row in rows if "timeline_ms" in row and row["plan"] != BEST]
    prompts = Counter((row["shape"], row["num_tokens"]) for row in shown)
    if not prompts:
        return False
    ((most_measured, _),) = prompts.most_common(1)
    shown = [row for row in shown if (row["shape"], row["num_tokens"]) == most_measured][
        :MOST_TIMELINES]
    figure.set_size_inches(9, 1.25 * len(shown) + 0.6)
    figure.suptitle(f"{title}: what each rank computes when, {shown[0]['shape']}, "
                    f"{shown[0]['num_tokens']:,} tokens")
    for index, row in enumerate(shown):
        axes = figure.add_subplot(len(shown), 1, index + 1)
        longest = max(other["ttft_s"] for other in shown if other["attention"] == row["attention"])
        for stage, spans in enumerate(row["timeline_ms"]):
            axes.broken_barh([(start / 1e3, (stop - start) / 1e3) for start, stop in spans],
                             (stage - 0.4, 0.8), linewidth=0,
                             facecolors=[COLOURS[number % 2] for number in range(len(spans))])
        axes.set(xlim=(0, longest), ylim=(len(row["timeline_ms"]) - 0.4, -0.6),
                 ylabel="rank", yticks=range(len(row["timeline_ms"])))
        label = " ".join(f"{kind} {row[kind]}" for kind in ("cp", "pp", "tp") if row[kind] > 1)
        axes.set_title(f"{row['attention']}, {label} {row['plan']}: {row['ttft_s']:.2f} s, waits "
                       f"{100 * row['idle']:.0f} %", fontsize=8, loc="left")
    axes.set_xlabel("s")
    return True
