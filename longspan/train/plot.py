"""A run's log as a picture: loss, bits per byte and rate over tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longspan.files.whole import replace_file
from longspan.train.run_log import read_log

PANELS = (("loss", "loss"), ("bits_per_byte", "bits per byte"),
          ("answer_accuracy", "answer accuracy"), ("right_pairs", "right pairs"),
          ("tokens_per_s", "tokens/s"), ("lr", "learning rate"))


def draw_run(log_file: Path, out_file: Path) -> bool:
    """Draw what the log has of `PANELS` as SVG, phases in colours; False where matplotlib is not
    installed, or there is nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [row for row in read_log(log_file) if "phase" in row]
    panels = [(key, title) for key, title in PANELS
              if any(row.get(key) is not None for row in rows)]
    if not rows:
        return False
    figure: Any = Figure(figsize=(9, 2.1 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axis, (key, title) in zip(axes, panels, strict=True):
        for name in dict.fromkeys(row["phase"] for row in rows):
            points = [(row["num_tokens"] / 1e6, row[key]) for row in rows
                      if row["phase"] == name and row.get(key) is not None]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), label=name, linewidth=1)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0].legend(ncols=5, fontsize=8)
    axes[-1].set_xlabel("million tokens")
    replace_file(out_file, lambda out: figure.savefig(out, format="svg"))
    return True
