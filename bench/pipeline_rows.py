"""Rows of `longspan bench pipeline` as tables and plots want them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longspan.bench.pipeline.simulate import BEST

Row = Mapping[str, Any]


def measured_rows(rows: Sequence[Row]) -> list[Row]:
    """Return what was measured, without errors; of each arrangement's fixed chunk lengths the best
    again, as a plan of its own. Longer limits of what the engine plans come last."""
    found = sorted((row for row in rows if row["source"] == "measured" and "error" not in row),
                   key=lambda row: row.get("limit", 0))
    best = dict[tuple[Any, ...], Row]()
    for row in found:
        key = tuple(row[name] for name in (
            "shape", "attention", "num_tokens", "cp", "pp", "tp", "layers"))
        if row["plan"].startswith("fixed ") and (
                key not in best or row["ttft_s"] < best[key]["ttft_s"]):
            best[key] = {**row, "plan": BEST, "chunk_len": row["longest_chunk"]}
    return [*found, *best.values()]
