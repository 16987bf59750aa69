"""The table of KV that comes back, from rows."""

from __future__ import annotations

import json
from pathlib import Path

from bench.report import build_table


def row(place: str, **more: object) -> dict[str, object]:
    return {"shape": "nano", "place": place, "num_tokens": 131_072, "attention": "sparse",
            "prefill_s": 50.0, "load_s": 1.5, "ttft_s": 4.0, "pause_s": 0.6,
            "step_budget_s": 1.0, **more}


def test_the_latest_row_of_each_prompt_and_place_is_shown(tmp_path: Path) -> None:
    rows = [row("disk", plan="new"), row("disk", plan="old", load_s=9.9, date="2026-11-01"),
            row("host", error="no memory"), {"place": "cancelled", "num_tokens": 5}]
    (tmp_path / "cache.chip.json").write_text(json.dumps({
        "bench": "cache", "date": "2026-11-29", "rows": rows,
        "device": {"name": "chip", "count": 1}}))
    text = build_table("cache", tmp_path)
    assert ("| nano, 131,072 tokens, sparse | disk | 50.0 s | 1.50 s | 3.0 % | 4.00 s | "
            "0.60 s / 1 s |") in text
    assert "9.9" not in text and "host" not in text


def test_without_rows_there_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "cache.chip.json").write_text(json.dumps({
        "bench": "cache", "date": "2026-11-29", "rows": [row("cancelled")],
        "device": {"name": "chip", "count": 1}}))
    assert build_table("cache", tmp_path) == ""
