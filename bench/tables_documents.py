"""Answers out of a folder and out of a PDF, and the places that are named for them."""

from __future__ import annotations

from collections.abc import Sequence

from bench.tables import Content, Row, caption, markdown

METRICS = {"answer": "answers right", "file": "file right", "passage": "passage right"}


def documents_section(contents: Sequence[Content]) -> str:
    """Return each model over a folder and over a PDF, a column for each metric."""
    parts = []
    for content in contents:
        rows = [row for row in content["rows"] if "error" not in row]
        kinds = dict.fromkeys((row["model"], row["documents"], row["attention"]) for row in rows)
        body = []
        for kind in kinds:
            own = {row["metric"]: row for row in rows
                   if (row["model"], row["documents"], row["attention"]) == kind}
            first = next(iter(own.values()))
            body.append([kind[0], _documents(first), f"{first['num_tokens']:,}",
                         *(_share(own.get(metric)) for metric in METRICS)])
        parts.append(caption(content, "% (95 % interval; questions)") + markdown(
            ["model", "documents", "tokens", *METRICS.values()], body))
    return "\n".join(parts)


def _documents(row: Row) -> str:
    return f"{row['num_documents']} files" if row["num_documents"] > 1 else "one PDF"


def _share(row: Row | None) -> str:
    return "" if row is None else (f"{100 * row['score']:.0f} ({100 * row['ci_low']:.0f} to "
                                   f"{100 * row['ci_high']:.0f}; {row['n']})")
