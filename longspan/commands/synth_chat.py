"""``longspan synth chat`` and ``pairs``: tasks with checked answers, as conversations."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longspan.commands.console import note, show_table
from longspan.commands.corpus import CorpusJob, claim, open_source, prepare_corpus, progress
from longspan.commands.workers import in_workers
from longspan.data.chat.rows import ChatPlanner, compose
from longspan.data.lines import Lines, count_lines, dump, read_lines
from longspan.data.source import Source
from longspan.errors import LongspanError
from longspan.files.owned import owned_folder
from longspan.files.whole import replaced

SPLITS = ("train", "held_out")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatJob:
    """What was asked for."""

    corpus: CorpusJob
    planner: ChatPlanner
    num_workers: int


def run(job: ChatJob) -> None:
    """Write ``FORM-train.jsonl``, ``FORM-held_out.jsonl`` and their card; go on after a cut."""
    with owned_folder(job.corpus.out):
        make_rows(job, prepare_corpus(job.corpus))


def make_rows(job: ChatJob, meta: Mapping[str, Any]) -> None:
    """Write rows of the corpus that is in the folder; ``meta`` are its counts."""
    out, form = job.corpus.out, job.planner.form
    longest = max(job.planner.num_rows)
    if meta["num_train_tokens"] < longest:
        raise LongspanError(f"rows of {longest:,} tokens: all training text has "
                            f"{meta['num_train_tokens']:,}; add text or ask for shorter rows")
    claim(out / f"{form}.json", {**asdict(job.planner), "corpus": meta["made_from"]})
    for split in SPLITS:
        seeds = job.planner.seeds(split, meta["num_held_out_tokens"])
        if seeds:
            write_rows(job, split, seeds)
        elif job.planner.held_out:
            note(f"no held-out rows: held-out text has {meta['num_held_out_tokens']:,} tokens; "
                 "add text or set aside more by --held-out")
    write_card(job.corpus, form, {"seed": job.planner.seed}, meta)


def write_rows(job: ChatJob, split: str, seeds: list[tuple[int, int]]) -> None:
    """Append the rows that are not there yet, in their order."""
    file = job.corpus.out / f"{job.planner.form}-{split}.jsonl"
    make = partial(_compose_in_worker, job.corpus.out, job.planner, split)
    with Lines(file) as lines:
        missing = seeds[count_lines(file):]
        with progress(split, sum(length for length, _ in missing)) as advance:
            for length, line in in_workers(make, missing, job.num_workers):
                lines.append(line)
                advance(length)


_sources: dict[tuple[Path, str], Source] = {}
"""What a worker has open: memory maps and tokenizers do not travel."""


def _compose_in_worker(
    out: Path, planner: ChatPlanner, split: str, seed: tuple[int, int]
) -> tuple[int, str]:
    key = out, split
    if key not in _sources:
        _sources[key] = open_source(out, split, True)
    return seed[0], dump(compose(planner, _sources[key], *seed))


def write_card(
    corpus: CorpusJob, form: str, facts: Mapping[str, Any], meta: Mapping[str, Any]
) -> None:
    """Write ``FORM-card.json`` about what the files hold; print it."""
    rows = [row for split in SPLITS
            for row in count_chat(split, read_lines(corpus.out / f"{form}-{split}.jsonl"))]
    card = {"made_by": f"longspan synth {form}", **facts, **corpus.facts(),
            **{name: value for name, value in meta.items() if name != "documents"}, "rows": rows}
    with replaced(corpus.out / f"{form}-card.json") as part:
        part.write_text(json.dumps(card, indent=1))
    show_table(form, ("split", "task", "rows", "tokens", "longest", "mistakes"), [
        (row["split"], row["task"], f"{row['num_rows']:,}", f"{row['num_tokens']:,}",
         f"{row['longest']:,}", ", ".join(f"{n} {why}" for why, n in row["why"].items()))
        for row in rows])


def count_chat(split: str, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows, questions, tokens and mistakes of a split by task."""
    found: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["task"]].append({
            "num_tokens": row["num_tokens"], "why": row.get("why"),
            "num_turns": sum(message["role"] == "user" for message in row["messages"])})
    return [{
        "split": split, "task": task, "num_rows": len(each),
        "num_questions": sum(row["num_turns"] for row in each),
        "num_tokens": sum(row["num_tokens"] for row in each),
        "longest": max(row["num_tokens"] for row in each),
        "why": dict(sorted(Counter(row["why"] for row in each if row["why"]).items()))}
        for task, each in sorted(found.items())]
