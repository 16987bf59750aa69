"""The reading order that CONTRIBUTING.md gives a newcomer stays short."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 900


def test_the_first_reading_is_short() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = re.findall(r"^\d\. (?:\[[^]]*\]\(|`)([\w/.]+)", page, re.MULTILINE)
    assert len(names) == 5
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in names]
    texts[0], rest = texts[0].split("## What a step computes")
    assert rest and sum(len(text.splitlines()) for text in texts) <= MAX_LINES
