"""Markdown of the evaluation's result files, for `bench.report`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.plots_eval import arms_of
from bench.tables import Content, Row, caption, dated, markdown
from bench.tables_train import AT, phase_len

COLUMNS = ("passkey", "ruler-11", "ruler-retrieval", "ruler-tracking", "ruler-counting")
SHORT = {"ruler-11": "RULER-11", "ruler-retrieval": "its retrieval", "ruler-tracking": "tracking",
         "ruler-counting": "counting"}
FEW_LENGTHS = (4096, 32_768, 131_072, 262_144, 524_288, 1_000_000, 1_048_576)
"""Shown of a model that was measured at more than `MANY` lengths; the docs have all."""
MANY = 6
SHOWN_BY = ("passkey", "ruler-11", "ruler-retrieval")
"""A row without any of these holds a question or two, for times."""
AFTER = "-after-"
"""In the name of a model that was judged after a phase of its training, before the phase's name."""
PLAIN = "rope"
"""How a training's phases are judged, unless a row says otherwise."""
Cells = dict[tuple[Any, ...], Row]


def eval_table(content: Content) -> str:
    """Scores of each model: a row for each length and attention, with what it cost beside them."""
    return "\n".join(_model_table(content, model) for model in dict.fromkeys(
        row["model"] for row in content["rows"]) if AFTER not in model and AT not in model)


def _model_table(content: Content, model: str) -> str:
    rows = [row for row in _whole(content, model) if row["task"] in COLUMNS]
    cells: Cells = {(row["task"], row["num_tokens"], row["attention"]): row for row in rows}
    lengths = sorted({row["num_tokens"] for row in rows})
    if len(lengths) > MANY:
        lengths = [length for length in lengths if length in FEW_LENGTHS]
    tasks = [task for task in COLUMNS if any(row["task"] == task for row in rows)]
    body = []
    for length in lengths:
        for arm in arms_of(rows):
            own = {task: cells.get((task, length, arm)) for task in tasks}
            if any(row and row["score"] is not None for task, row in own.items()
                   if task in SHOWN_BY):
                # density and times hardly depend on the task
                body.append([f"{length:,}", arm, *(_score(row) for row in own.values()),
                             *(_first(own.values(), name, text) for name, _, text in COSTS)])
    head = ["tokens", "attention", *(SHORT.get(task, task) for task in tasks),
            *(title for _, title, _ in COSTS)]
    kept = [place for place in range(len(head)) if any(line[place] for line in body)]
    return caption(dated(content, rows),
                   f"{model}: % right (95 % interval; questions)") + markdown(
        [head[place] for place in kept], [[line[place] for place in kept] for line in body])


COSTS = (("answer_nll", "retrieval, nats a token", "{:.2f}"), ("density", "density", "{:.1f} %"),
         ("ttft_s", "first token", "{:.2f} s"))
"""Columns, shown where some row has them: its field, its title, how it is written."""


def scores_section(contents: Sequence[Content]) -> str:
    """Every score over all depths: a table for each model and attention, a row for each task."""
    text = "### All scores\n\n% right (95 % interval; questions).\n\n"
    parts = []
    for content in contents:
        for model in dict.fromkeys(row["model"] for row in content["rows"]):
            rows = [row for row in _whole(content, model) if row["score"] is not None]
            for arm in arms_of(rows):
                own = [row for row in rows if row["attention"] == arm and row["num_tokens"]]
                parts.append(caption(dated(content, own), f"{model}, {arm}") + _task_table(own))
    return text + "\n".join(parts)


def _task_table(rows: Sequence[Row]) -> str:
    lengths = sorted({row["num_tokens"] for row in rows})
    cells: Cells = {(row["task"], row["num_tokens"]): row for row in rows}
    return markdown(["task", *(f"{length:,}" for length in lengths)], [
        [task, *(_score(cells.get((task, length))) for length in lengths)]
        for task in dict.fromkeys(row["task"] for row in rows)])


def phases_section(contents: Sequence[Content]) -> str:
    """Scores after each phase of a training, as the report's Table 2 (arXiv 2501.15383)."""
    parts = []
    for content in contents:
        models = dict.fromkeys(row["model"] for row in content["rows"] if AFTER in row["model"])
        rows = {((row["model"], row["attention"]), row["task"], row["num_tokens"]): row
                for model in models for row in _whole(content, model)}
        for base in dict.fromkeys(model.partition(AFTER)[0] for model in models):
            own = {key: row for key, row in rows.items() if row["model"].startswith(base + AFTER)}
            phases = sorted(dict.fromkeys(phase for phase, _, _ in own), key=_phase_order)
            lengths = sorted({length for _, _, length in own if length})
            body = [[_phase_label(*phase), SHORT[task],
                     *(_score(own.get((phase, task, length))) for length in lengths)]
                    for task in SHORT for phase in phases]
            plain = "plain RoPE" + (
                "" if all(arm == PLAIN for _, arm in phases) else " unless it says otherwise")
            parts.append(caption(
                dated(content, own.values()),
                f"{base} after each phase, {plain}: % right (95 % interval; questions)")
                + markdown(["after", "", *(f"{length:,}" for length in lengths)], body))
    return "\n".join(parts)


def _phase_order(phase: tuple[str, str]) -> tuple[int, bool]:
    """Order phases by their length, what has none before them; plain RoPE comes first."""
    model, arm = phase
    return (phase_len(model.partition(AFTER)[2]), arm != PLAIN)


def _phase_label(model: str, arm: str) -> str:
    name = model.partition(AFTER)[2]
    return name if arm == PLAIN else f"{name}, {arm}"


def fidelity_section(contents: Sequence[Content]) -> str:
    """Sparse attention beside dense: all texts of a length together, and the worst of them."""
    text = "### Sparse attention beside dense\n\n`longspan eval fidelity`: the same texts read " \
           "densely; the floor is dense with other prefill chunks.\n\n"
    head = ["model", "tokens", "attention", "texts", "KL, nats", "99 %", "worst task",
            "top-1 agrees", "nats more", "recall", "worst head", "output error", "density"]
    return text + "\n".join(caption(content, "beside dense attention") + markdown(head, [
        [row["model"], f"{row['num_tokens']:,}", row["attention"], str(row["n"]),
         _interval(row, "kl"), f"{row['kl_p99']:.2g}", _worst(row), f"{100 * row['top1']:.2f} %",
         _interval(row, "nats_more"), _percent(row, "recall"),
         _percent(row.get("worst_head", {}), "recall"), _percent(row, "output_error"),
         _percent(row, "density")]
        for row in content["rows"] if row["task"] == "all"]) for content in contents)


def _percent(row: Row, name: str) -> str:
    return f"{100 * row[name]:.1f} %" if row.get(name) is not None else ""


def _worst(row: Row) -> str:
    return f"{row['worst_task']['task']} ({row['worst_task']['kl']:.2g})"


def _interval(row: Row, name: str) -> str:
    if row[f"{name}_low"] is None:
        return f"{row[name]:.2g}"
    return f"{row[name]:.2g} ({row[f'{name}_low']:.2g} to {row[f'{name}_high']:.2g})"


def _whole(content: Content, model: str) -> list[Row]:
    """Return the model's rows over all depths whose scores are shares."""
    return [row for row in content["rows"] if row["depth"] is None and row["model"] == model
            and (row["score"] is None or row["task"] != "perplexity")]


def _first(rows: Any, name: str, text: str) -> str:
    """Write the first figure of this name that the rows have: nats of retrieval, else of any."""
    first = "ruler-retrieval" if name == "answer_nll" else "ruler-11"
    for row in sorted((row for row in rows if row), key=lambda row: row["task"] != first):
        if row is not None and row.get(name) is not None:
            return text.format(row[name] * (100 if "%" in text else 1))
    return ""


def _score(row: Row | None) -> str:
    if row is None or row["score"] is None:
        return "not run"
    return (f"{100 * row['score']:.0f} ({100 * row['ci_low']:.0f}-{100 * row['ci_high']:.0f}; "
            f"{row['n']})")
