"""Prints what was measured on several ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longspan.bench.pipeline.costs import Ranks
from longspan.commands.console import note, seconds, show_table

MEASURED, DECODE, USERS = "measured", "decode", "users"
"""Sources of rows: a prompt's time to the first token, steps behind a context, prompts together."""


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print times, speed-ups, idle shares and predictions as a table on stdout."""
    every = [row for row in rows if "error" not in row]
    measured = [row for row in every if row["source"] == MEASURED]
    if not every:
        note("nothing was measured")
    show_table("time to first token, measured", (
        "shape", "attention", "tokens", "ranks", "plan", "chunks", "TTFT", "speed-up", "lost",
        "idle", "predicted", "steps off by"), [
        (row["shape"], row["attention"], f"{row['num_tokens']:,}",
         _label(row), row["plan"], row["num_chunks"],
         seconds(row["ttft_s"]), f"{row['speedup']:.2f}x" if "speedup" in row else "",
         f"{100 * row['lost']:.0f} %" if "lost" in row else "", f"{100 * row['idle']:.0f} %",
         seconds(row["predicted_s"]) if "predicted_s" in row else "",
         f"{100 * row['step_error']:.0f} %")
        for row in measured])
    decoded = [row for row in every if row["source"] == DECODE]
    if decoded:
        show_table("decode", ("shape", "context", "ranks", "step ms", "alone ms", "KV"), [
            (row["shape"], f"{row['num_tokens']:,}", _label(row), f"{row['step_ms']:.3f}",
             f"{row['sync_step_ms']:.3f}", "divided" if row["divides_kv"] else "whole")
            for row in decoded])
    together = [row for row in every if row["source"] == USERS]
    if together:
        show_table("prompts together", ("shape", "attention", "tokens", "ranks", "TTFT", "KV"), [
            (row["shape"], row["attention"], f"{row['users']} x {row['num_tokens']:,}",
             _label(row), ", ".join(map(seconds, row["ttft_each_s"])),
             "divided" if row["divides_kv"] else "whole") for row in together])


def _label(row: Mapping[str, Any]) -> str:
    return Ranks(cp=row["cp"], pp=row["pp"], tp=row["tp"]).label
