"""Markdown of KV that comes back from host memory and disk, for `bench.report`."""

from __future__ import annotations

from collections.abc import Sequence

from bench.tables import Content, Row, caption, markdown

PLACES = {"host": "host memory", "turns": "host memory, two prompts in turn", "disk": "disk"}
HEAD = ("prompt", "from", "prefill", "loaded in", "of the prefill", "first token",
        "longest pause / step budget")


def cache_section(contents: Sequence[Content]) -> str:
    """Time until a prompt's KV is back, beside its prefill; the latest row of each prompt."""
    return "\n".join(filter(None, map(_cache_table, contents)))


def _cache_table(content: Content) -> str:
    latest = dict[tuple[str, int, str, str], Row]()
    for row in sorted(content["rows"], key=lambda row: str(row.get("date", content["date"]))):
        if row["place"] in PLACES and "error" not in row:
            latest[row["shape"], row["num_tokens"], row["attention"], row["place"]] = row
    body = [[
        f"{shape}, {num_tokens:,} tokens, {attention}", PLACES[place],
        f"{row['prefill_s']:.1f} s", f"{row['load_s']:.2f} s",
        f"{100 * row['load_s'] / row['prefill_s']:.1f} %", f"{row['ttft_s']:.2f} s",
        f"{row['pause_s']:.2f} s / {row['step_budget_s']:g} s"]
        for (shape, num_tokens, attention, place), row in sorted(latest.items())]
    return caption(content, "KV that comes back") + markdown(HEAD, body) if body else ""
