"""What `longspan calibrate` shows: a table of layers, and a map of layers and heads."""

from __future__ import annotations

from pathlib import Path

from longspan.attention.sparsity import SparsityPlan
from longspan.commands.console import note, percent, show_table
from longspan.errors import LongspanError, MissingDependencyError


def show_heads(plan: SparsityPlan, threshold: float) -> None:
    """Print recall and budgets by layer, and name the diffuse heads."""
    recalls = plan.provenance["recall"]
    show_table("calibrated budgets", ("layer", "columns, mean", "diagonals, mean", "recall, least",
                                      "mean", "below"), [
        (layer, f"{_mean(plan.vertical[layer]):,.0f}", f"{_mean(plan.slash[layer]):,.0f}",
         percent(min(row)), percent(_mean(row)), sum(value < threshold for value in row))
        for layer, row in enumerate(recalls)])
    for head in plan.provenance["diffuse"]:
        note(f"diffuse: layer {head['layer']} head {head['head']}, recall "
             f"{percent(head['recall'])} with the largest budgets; with tile means its output is "
             f"off by {percent(head['output_error'])}")


def draw_map(plan: SparsityPlan, file: Path) -> Path:
    """Draw recall and budgets of every head as SVG. Raises `MissingDependencyError` without
    matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "plots need matplotlib, which is not installed: pip install 'longspan[plots]'"
        ) from None
    panels = (
        ("recall", plan.provenance["recall"], (0.0, 1.0)),
        ("columns", plan.vertical, (0.0, None)), ("diagonals, tokens", plan.slash, (0.0, None)))
    height = 1.2 + 0.22 * len(plan.vertical)
    with rc_context({"svg.hashsalt": "longspan", "font.size": 9}):
        figure = Figure(figsize=(11, height), layout="constrained")
        for axes, (name, values, (low, high)) in zip(
                figure.subplots(1, len(panels)), panels, strict=True):
            image = axes.pcolormesh(values, vmin=low, vmax=high, cmap="cividis",
                                    edgecolors="white", linewidth=0.3)
            axes.invert_yaxis()
            axes.set(title=name, xlabel="head", ylabel="layer")
            figure.colorbar(image)
        try:
            figure.savefig(file, metadata={"Date": None})
        except OSError as error:
            raise LongspanError(f"{file}: cannot be written ({error.strerror})") from None
    return file


def _mean(values: list[float] | tuple[int, ...]) -> float:
    return sum(values) / len(values)
