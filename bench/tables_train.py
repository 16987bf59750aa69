"""Markdown of what training is for: its goals before and after, and the effects of its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from bench.tables import Content, Row, caption, dated, markdown
from longspan.commands.options import parse_length
from longspan.eval.stats import wilson_interval

AT = "-at-"
"""In the name of a model that was judged at a stage of its training, before the stage's name."""
STAGES = ("shipped", "base", "practice", "sft", "dpo")
"""In the order of the columns; others follow."""
FIRST = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
         "niah_multikey_3")
HELD_OUT = "held_out_bits_per_byte"
GOALS: Mapping[str, tuple[tuple[str, ...], str | None, str]] = {
    "single and multi-key": (FIRST, None, "100"),
    "multi-query": (("niah_multiquery",), None, ">= 95"),
    "multi-value": (("niah_multivalue",), None, ">= 95"),
    "variable tracking": (("vt",), None, ">= 80 at 4K"),
    "unseen wordings": (("unseen_wordings",), None, ">= 80"),
    "absent keys refused": (("absent",), "refused", ">= 95"),
    "false refusals": (("absent",), "false refusals", "<= 2"),
    "passkey": (("passkey",), None, "100")}
"""Tasks of each line, the value that counts (None: the score), and the goal."""


def phase_len(name: str) -> int:
    """Return the length that a phase is named by, tokens; 0 where its name has none."""
    try:
        return parse_length(name)
    except ValueError:
        return 0


def goals_section(contents: Sequence[Content]) -> str:
    """Return each goal at each length, a column for each stage."""
    parts = []
    for content in contents:
        rows = [row for row in content["rows"] if AT in row["model"] and row["depth"] is None]
        for base in dict.fromkeys(row["model"].partition(AT)[0] for row in rows):
            own = [row for row in rows if row["model"].startswith(base + AT)]
            parts.append(caption(dated(content, own), f"{base}: % (95 % interval; questions)")
                         + _goals_table(own))
    return "\n".join(parts)


def _goals_table(rows: Sequence[Row]) -> str:
    stages = sorted({row["model"].partition(AT)[2] for row in rows}, key=_stage_order)
    body = []
    for name, (tasks, value, goal) in GOALS.items():
        found = [row for row in rows if row["task"] in tasks and row["score"] is not None]
        for length, attention in sorted({(row["num_tokens"], row["attention"]) for row in found}):
            cells = [[row for row in found if row["num_tokens"] == length
                      and row["attention"] == attention and row["model"].endswith(AT + stage)]
                     for stage in stages]
            body.append([name, goal, f"{length:,}", attention,
                         *(_pooled(cell, value) for cell in cells)])
    return markdown(["", "goal", "tokens", "attention", *stages], body)


def _stage_order(stage: str) -> tuple[int, str]:
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)


def _pooled(rows: Sequence[Row], value: str | None) -> str:
    """Write the questions of several tasks as one: of shares of several answers (one task) the
    row's own interval."""
    if not rows:
        return "not run"
    if value is None and len(rows) == 1:
        row = rows[0]
        return (f"{100 * row['score']:.1f} ({100 * row['ci_low']:.1f}-{100 * row['ci_high']:.1f}; "
                f"{row['n']})")
    n = sum(row["n"] for row in rows)
    if value is not None:  # every other question is of this kind
        n = -(-n // 2) if value == "refused" else n // 2
    share = fmean([row["score"] if value is None else row["values"][value] for row in rows
                   for _ in range(row["n"])])
    low, high = wilson_interval(share * n, n)
    return f"{100 * share:.1f} ({100 * low:.1f}-{100 * high:.1f}; {n})"


def effects_section(contents: Sequence[Content]) -> str:
    """Return each effect: both arms over the seeds, and the mean difference with its interval."""
    head = ["tokens", "", "without", "with", "difference", "95 % interval", "seeds"]
    parts = []
    for content in contents:
        for effect in dict.fromkeys(row["effect"] for row in content["rows"]):
            rows = [row for row in content["rows"] if row["effect"] == effect]
            first = rows[0]
            parts.append(caption(
                dated(content, rows),
                f"{effect}: {first['without']} or {first['with']}, % right") + markdown(head, [
                    [f"{row['num_tokens']:,}", row["task"], _percent(row["without_score"]),
                     _percent(row["with_score"]), f"{100 * row['difference']:+.1f}",
                     f"{100 * row['ci_low']:+.1f} to {100 * row['ci_high']:+.1f}",
                     str(row["num_seeds"])] for row in rows]))
    return "\n".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def extensions_section(contents: Sequence[Content]) -> str:
    """Return what each phase of extending a checkpoint took, and what short contexts lost by it."""
    head = ["phase", "tokens", "tokens/s", "TFLOP/s", "loss", "held-out bits per byte", "of before"]
    parts = []
    for content in contents:
        untrained = {row["model"]: row["before"][HELD_OUT] for row in content["rows"]
                     if HELD_OUT in row.get("before", {})}
        for model, first in untrained.items():
            rows = [row for row in content["rows"] if row["model"] == model]
            body = [["none", "", "", "", "", f"{first:.4f}", ""]]
            for row in sorted(rows, key=lambda row: phase_len(row["phase"])):
                bits = (row["gate"] or {}).get(HELD_OUT)
                body.append([
                    row["phase"], f"{row['num_tokens_trained']:,}", f"{row['tokens_per_s']:,}",
                    f"{row['tflops']:.0f}", f"{row['loss']:.4f}",
                    "not run" if bits is None else f"{bits:.4f}",
                    "" if bits is None else f"{100 * (bits / first - 1):+.2f} %"])
            parts.append(caption(dated(content, rows), model) + markdown(head, body))
    return "\n".join(parts)
