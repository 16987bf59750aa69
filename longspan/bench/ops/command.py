"""`longspan bench ops`: attention and what surrounds it, ours beside PyTorch's, and the ceilings.

One layer of a real shape with random inputs. Nothing of ours is timed before it agrees with the
specification (`checks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from longspan.bench.ops.dense import SECTIONS, LayerBench, OpsOptions
from longspan.bench.ops.experts import ExpertBench
from longspan.bench.ops.linear import LinearBench
from longspan.bench.ops.sparse import SparseBench
from longspan.bench.session import BenchSession
from longspan.bench.shapes import Shape
from longspan.commands.console import show_table


def run(session: BenchSession, shape: Shape, options: OpsOptions) -> int:
    """Measure, write rows, print the table. Returns the exit status."""
    layer = LayerBench(session, shape, options)
    sparse = SparseBench(layer)
    sections: Mapping[str, Callable[[], None]] = {
        "ceilings": layer.ceilings, "chunk": layer.chunks, "sparse": sparse.chunks,
        "decode": layer.decode, "positions": sparse.positions, "whole": sparse.whole,
        "dense": layer.squares, "contents": sparse.contents, "pointwise": layer.pointwise,
        "experts": ExpertBench(layer).run, "linear": LinearBench(layer).run}
    with torch.inference_mode():
        for name in SECTIONS:
            if name in options.sections:
                sections[name]()
    show(session.rows)
    return session.finish()


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of one run as a table on stdout."""
    names = ("time_ms", "tflops", "tb_per_s", "density", "ratio", "workspace_mib")
    body = [
        (row["op"], row["impl"], _sizes(row["params"]),
         *("error" if "error" in row and name == "time_ms" else _cell(row.get(name))
           for name in names))
        for row in rows]
    show_table("ops", ("op", "impl", "of", "ms", "TFLOP/s", "TB/s", "density", "ratio", "MiB"),
               body)


def _sizes(params: Mapping[str, Any]) -> str:
    """Say shortly what the row is about."""
    return " ".join(str(value) for name, value in params.items()
                    if name not in ("shape", "plan", "layer", "chunk_len"))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"
