"""``longspan synth``: text files to rows of long-range tasks, for any tokenizer and any trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longspan.commands.console import note, show_table
from longspan.commands.corpus import (
    CARD,
    CorpusJob,
    claim,
    open_source,
    prepare_corpus,
    progress,
)
from longspan.commands.workers import in_workers
from longspan.data.card import count_rows, draw_card
from longspan.data.shards import RowPlanner, Shard, check_lengths, write_shard
from longspan.data.source import Source
from longspan.data.tasks import DOCUMENT_TASKS
from longspan.errors import MissingDependencyError
from longspan.files.owned import owned_folder
from longspan.files.parquet import arrow
from longspan.files.whole import replaced

ROWS = "rows.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthJob:
    """What was asked for."""

    corpus: CorpusJob
    planner: RowPlanner
    num_workers: int


def run(job: SynthJob) -> None:
    """Write corpus, rows and card; go on where an earlier run with the same options was cut."""
    arrow()
    with owned_folder(job.corpus.out):
        _run(job)


def _run(job: SynthJob) -> None:
    meta = prepare_corpus(job.corpus)
    out, may_join = job.corpus.out, job.corpus.may_join
    source = open_source(out, "train", may_join)
    check_lengths(source, job.planner, tuple(DOCUMENT_TASKS))
    claim(out / ROWS, {**asdict(job.planner), "may_join": may_join, "corpus": meta["made_from"]})
    shards = job.planner.shards(meta["num_held_out_tokens"])
    _note_missing(job.planner, meta["num_held_out_tokens"])
    make_rows(job, shards)
    write_card(job, meta, shards)


def _note_missing(planner: RowPlanner, num_tokens: int) -> None:
    """Say which held-out rows there are not."""
    too_long = [length for length in planner.num_rows if length > num_tokens]
    if planner.held_out and too_long:
        note(f"no held-out rows of {min(too_long):,} tokens and more: held-out text has "
             f"{num_tokens:,}; add text or set aside more by --held-out")


def make_rows(job: SynthJob, shards: Sequence[Shard]) -> None:
    """Write the files that are not there yet."""
    for stale in job.corpus.out.glob("*.parquet.part"):
        stale.unlink()
    missing = [s for s in shards if not (job.corpus.out / s.name).is_file()]
    write = partial(_write_in_worker, job.corpus.out, job.planner, job.corpus.may_join)
    with progress("rows", sum(s.num_rows * s.length for s in missing)) as advance:
        for shard in in_workers(write, missing, job.num_workers):
            advance(shard.num_rows * shard.length)


_sources: dict[tuple[Path, str, bool], Source] = {}
"""What a worker has open: memory maps and tokenizers do not travel."""


def _write_in_worker(out: Path, planner: RowPlanner, may_join: bool, shard: Shard) -> Shard:
    key = out, shard.split, may_join
    if key not in _sources:
        _sources[key] = open_source(*key)
    write_shard(shard, _sources[key], planner, out)
    return shard


def write_card(job: SynthJob, meta: Mapping[str, Any], shards: Sequence[Shard]) -> None:
    """Write card.json and, where matplotlib is installed, card.svg; print what rows there are."""
    rows = count_rows([job.corpus.out / shard.name for shard in shards])
    card = {
        "made_by": "longspan synth", "seed": job.planner.seed, **job.corpus.facts(),
        **{name: value for name, value in meta.items() if name != "documents"}, "rows": rows}
    with replaced(job.corpus.out / CARD) as part:
        part.write_text(json.dumps(card, indent=1))
    show_table("rows", ("split", "length", "task", "rows", "answers", "median distance"), [
        (row["split"], f"{row['length']:,}", row["task"], f"{row['num_rows']:,}",
         f"{row['num_answers']:,}", f"{row['distances'].get('p50', 0):,}") for row in rows])
    try:
        draw_card(rows, job.corpus.out / "card.svg")
    except MissingDependencyError as error:
        note(f"no plot: {error}")
