"""Answers out of documents: rows of three metrics to a line."""

from __future__ import annotations

from bench.tables_documents import documents_section


def test_a_line_for_each_model_and_what_was_read() -> None:
    rows = [{"model": "m", "documents": name, "attention": "auto", "metric": metric, "n": 40,
             "score": score, "ci_low": 0.5, "ci_high": 0.9, "num_documents": count,
             "num_tokens": 8765}
            for name, count in (("houses", 40), ("report.pdf", 1))
            for metric, score in (("answer", 0.75), ("file", 0.8))]
    text = documents_section([{"device": {"name": "a CPU", "count": 2}, "date": "2026-11-29",
                               "rows": [*rows, {"error": "it broke"}]}])
    assert text.startswith("% (95 % interval; questions) (2 x a CPU, 2026-11-29)\n")
    assert text.splitlines()[-2:] == [
        f"| m | {what} | 8,765 | 75 (50 to 90; 40) | 80 (50 to 90; 40) |  |"
        for what in ("40 files", "one PDF")]
