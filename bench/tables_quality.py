"""Markdown of `longspan bench quality`: what is kept at equal cost; policies beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench.tables import caption, dated, markdown, measured
from longspan.commands.results import KEY_FIELDS, row_identity
from longspan.eval.stats import Z_95, wilson_interval

Content = Mapping[str, Any]
Row = Mapping[str, Any]
NAMED = ("dense", "paper", "tile")
"""Settings without changes of their own."""
MEANS = ("density", "cost", "seconds", "recall_typical", "recall_scouts", "answer_nats",
         "text_nats", "top1")


def quality_section(contents: Sequence[Content]) -> str:
    """Answers and recall at equal cost."""
    text = "### What sparse prefill keeps\n\n`longspan bench quality`: the same prompts for all; " \
           "cost is density plus the tile means; recall is the attention mass kept, by head.\n\n"
    head = ["tokens", "questions", "place", "attention", "prefill chunk", "right", "density",
            "cost", "recall, mean", "p5 of heads", "least head"]
    parts = []
    for content in contents:
        rows = [row for row in pooled(measured(content)) if row["attention"] in NAMED
                and ("recall_typical" not in row or row.get("recall"))]
        for model in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == model]
            body = [[
                f"{row['num_tokens']:,}", str(row["num_questions"]), row["place"],
                row["attention"],
                f"{row['chunk_len']:,}" if row["attention"] != "dense" else "",
                _right(row), f"{100 * row['density']:.2f} %", f"{100 * row['cost']:.2f} %",
                *_recall(row)]
                for row in own]
            parts.append(caption(dated(content, own), f"{model}: exact answers and recall")
                         + markdown(head, body))
    return text + "\n".join(parts)


def policies_section(contents: Sequence[Content]) -> str:
    """Policies beside dense attention on the same prompts: answers, KL, text, kept mass."""
    head = ["policy", "right", "95 %", "KL to dense", "95 %", "answers, nats", "text, nats",
            "mass kept", "of scouts", "density"]
    parts = []
    for content in contents:
        rows = [row for row in pooled(measured(content)) if "kl" in row]
        cells = dict.fromkeys((row["model"], row["num_tokens"], row["place"]) for row in rows)
        for model, num_tokens, place in cells:
            own = [row for row in rows if (row["model"], row["num_tokens"], row["place"])
                   == (model, num_tokens, place)]
            settings = {row["attention"] for row in own}
            if settings <= set(NAMED) or all(name.startswith("dense") for name in settings):
                continue  # no policy among them, or precisions of dense attention
            body = [_policy(row) for row in sorted(own, key=lambda row: -row["density"])]
            parts.append(caption(
                dated(content, own), f"{model}, {num_tokens:,} tokens, questions: {place}")
                + markdown(head, body))
    return "\n".join(parts)


def pooled(rows: Sequence[Row]) -> list[Row]:
    """Return one row for those that differ in nothing but their seed: all their questions, means of
    the rest."""
    fields = [name for name in KEY_FIELDS["quality"] if name != "seed"]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row_identity(row, fields), []).append(row)
    return [_together(each) if len(each) > 1 else each[0] for each in groups.values()]


def _together(rows: Sequence[Row]) -> Row:
    n = sum(row["n"] for row in rows)
    right = sum(round(row["score"] * row["n"]) for row in rows)
    low, high = wilson_interval(right, n)
    found = {**rows[0], "n": n, "score": right / n, "ci_low": low, "ci_high": high}
    for name in MEANS:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            found[name] = sum(values) / len(values)
    if all("kl" in row for row in rows):
        found["kl"] = sum(row["kl"] for row in rows) / len(rows)
    if all("kl_low" in row for row in rows):
        errors = [(row["kl_high"] - row["kl_low"]) / (2 * Z_95) for row in rows]
        error = Z_95 * math.hypot(*errors) / len(rows)
        found |= {"kl_low": found["kl"] - error, "kl_high": found["kl"] + error}
    return found


def _policy(row: Row) -> list[str]:
    interval = ""
    if "kl_low" in row:
        interval = f"{row['kl_low']:.4f} to {row['kl_high']:.4f}"
    return [row["attention"], _right(row),
            f"{100 * row['ci_low']:.0f} to {100 * row['ci_high']:.0f}", f"{row['kl']:.4f}",
            interval, _nats(row, "answer_nats"), _nats(row, "text_nats"),
            _percent(row, "recall_typical"), _percent(row, "recall_scouts"),
            f"{100 * row['density']:.1f} %"]


def _right(row: Row) -> str:
    return f"{row['score'] * row['n']:.0f} of {row['n']}"


def _nats(row: Row, name: str) -> str:
    return f"{row[name]:.4f}" if name in row else ""


def _percent(row: Row, name: str) -> str:
    return "" if row.get(name) is None else f"{100 * row[name]:.1f} %"


def _recall(row: Row) -> list[str]:
    recall = row["recall"] or {}
    return [f"{100 * recall[name]:.1f} %" if name in recall else ""
            for name in ("mean", "p5", "min")]
