"""``longspan synth``: text files to rows of long-range tasks, for any tokenizer and any trainer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from longspan.commands.console import note, show_table
from longspan.data.card import count_rows, draw_card
from longspan.data.corpus import write_corpus
from longspan.data.documents import Reader, Reading, Root, describe_roots, num_source_bytes
from longspan.data.files import replaced
from longspan.data.filters import Filters, Refusal
from longspan.data.intake import Intake
from longspan.data.records import arrow
from longspan.data.shards import RowPlanner, Shard, check_lengths, write_shard
from longspan.data.source import Source, load_source
from longspan.data.tasks import DOCUMENT_TASKS
from longspan.data.tokens import load_tokenizer
from longspan.errors import LongspanError, MissingDependencyError

CORPUS, TOKENIZER, ROWS, CARD = "corpus", "tokenizer", "rows.json", "card.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthJob:
    """What was asked for."""

    roots: Sequence[Root]
    reading: Reading
    filters: Filters
    tokenizer: Path
    out: Path
    planner: RowPlanner
    may_join: bool
    licence: str
    num_workers: int


def run(job: SynthJob) -> None:
    """Write corpus, rows and card; go on where an earlier run with the same options was cut."""
    arrow()
    _check_out(job)
    made_from = corpus_identity(job)
    meta = _read(job.out / CORPUS / "meta.json")
    if meta is None:
        meta = _make_corpus(job, made_from)
    elif meta.get("made_from") != made_from:
        raise _other(job.out / CORPUS)
    print_table(meta["table"])
    if meta["num_unknown_tokens"]:
        note(f"{meta['num_unknown_tokens']:,} tokens are unknown: the tokenizer cannot spell all "
             "of the text")
    tokenizer_dir = job.out / TOKENIZER
    tokenizer_dir.mkdir(exist_ok=True)
    with replaced(tokenizer_dir / "tokenizer.json") as part:
        part.write_text(load_tokenizer(job.tokenizer).to_str(), encoding="utf-8")
    source = open_source(job.out, "train", job.may_join)
    check_lengths(source, job.planner, tuple(DOCUMENT_TASKS))
    identity = {**asdict(job.planner), "may_join": job.may_join, "corpus": made_from}
    identity = json.loads(json.dumps(identity, default=dict))
    if _read(job.out / ROWS) not in (None, identity):
        raise _other(job.out)
    with replaced(job.out / ROWS) as part:
        part.write_text(json.dumps(identity, indent=1))
    shards = job.planner.shards(meta["num_held_out_tokens"])
    _note_missing(job.planner, meta["num_held_out_tokens"])
    make_rows(job, shards)
    write_card(job, meta, shards)


def corpus_identity(job: SynthJob) -> str:
    """Digest of everything that the corpus depends on."""
    tokenizer = load_tokenizer(job.tokenizer).to_str()
    text = json.dumps([describe_roots(job.roots, job.reading), asdict(job.filters),
                       job.planner.held_out, hashlib.sha256(tokenizer.encode()).hexdigest()])
    return hashlib.sha256(text.encode()).hexdigest()


def _check_out(job: SynthJob) -> None:
    out = job.out
    if out.exists() and not out.is_dir():
        raise LongspanError(f"{out} is a file: name a folder")
    if out.is_dir() and any(out.iterdir()) and not any(
            (out / name).exists() for name in (CORPUS, f"{CORPUS}.part")):
        raise LongspanError(f"{out} has other files: name a new folder")


def _other(path: Path) -> LongspanError:
    return LongspanError(
        f"{path} was made from other files or options: repeat these to go on, or name a new folder")


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.is_file() else None


def _make_corpus(job: SynthJob, made_from: str) -> dict[str, Any]:
    """Read, filter and tokenise; nothing stays of it when there is no text."""
    intake = Intake()
    is_new = not job.out.exists()
    tokenizer = load_tokenizer(job.tokenizer)
    try:
        with progress("reading", num_source_bytes(job.roots)) as advance:
            reader = Reader(job.reading, Refusal(job.filters), intake, advance)
            write_corpus(reader.read(job.roots), tokenizer, job.out / CORPUS, intake,
                         job.planner.held_out, {"made_from": made_from})
    except LongspanError:
        if is_new:
            shutil.rmtree(job.out, ignore_errors=True)
        raise
    return _read(job.out / CORPUS / "meta.json") or {}


def open_source(out: Path, split: str, may_join: bool) -> Source:
    """Return a split of what was written."""
    return replace(load_source(out, split), may_join=may_join)


def _note_missing(planner: RowPlanner, num_tokens: int) -> None:
    """Say which held-out rows there are not."""
    too_long = [length for length in planner.num_rows if length > num_tokens]
    if planner.held_out and too_long:
        note(f"no held-out rows of {min(too_long):,} tokens and more: held-out text has "
             f"{num_tokens:,}; add text or set aside more by --held-out")


def make_rows(job: SynthJob, shards: Sequence[Shard]) -> None:
    """Write the files that are not there yet."""
    for stale in job.out.glob("*.parquet.part"):
        stale.unlink()
    missing = [s for s in shards if not (job.out / s.name).is_file()]
    write = partial(_write_in_worker, job.out, job.planner, job.may_join)
    with progress("rows", sum(s.num_rows * s.length for s in missing)) as advance:
        for shard in _in_workers(write, missing, job.num_workers):
            advance(shard.num_rows * shard.length)


def _in_workers(
    write: Callable[[Shard], Shard], shards: Sequence[Shard], num_workers: int
) -> Iterator[Shard]:
    if num_workers <= 1 or len(shards) <= 1:
        yield from map(write, shards)
        return
    # Workers leave interrupts to this process: one that dies of them would be waited for forever.
    with ProcessPoolExecutor(num_workers, get_context("spawn"), signal.signal,
                             (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield from pool.map(write, shards)
        except BrokenProcessPool:
            raise LongspanError("a process that makes rows was ended from outside, for want of "
                                "memory perhaps: repeat the command with fewer --workers") from None


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
    rows = count_rows([job.out / shard.name for shard in shards])
    card = {
        "made_by": "longspan synth", "licence": job.licence,
        "seed": job.planner.seed, "tokenizer": str(job.tokenizer), "filters": asdict(job.filters),
        "sources": [root.path for root in job.roots],
        **{name: value for name, value in meta.items() if name != "documents"}, "rows": rows}
    with replaced(job.out / CARD) as part:
        part.write_text(json.dumps(card, indent=1))
    show_table("rows", ("split", "length", "task", "rows", "answers", "median distance"), [
        (row["split"], f"{row['length']:,}", row["task"], f"{row['num_rows']:,}",
         f"{row['num_answers']:,}", f"{row['distances'].get('p50', 0):,}") for row in rows])
    try:
        draw_card(rows, job.out / "card.svg")
    except MissingDependencyError as error:
        note(f"no plot: {error}")


def print_table(tallies: Sequence[Mapping[str, Any]]) -> None:
    """Print what became of every file."""
    show_table("files", ("source", "", "files", "bytes", "tokens", "for example"), [
        (tally["source"], tally["fate"], f"{tally['num_files']:,}", f"{tally['num_bytes']:,}",
         f"{tally['num_tokens']:,}" if tally["num_tokens"] else "", tally["example"])
        for tally in tallies])


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr, where that is a terminal; gives what advances it."""
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
               TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total or None)
        yield lambda amount: bar.advance(task, amount)


def default_workers() -> int:
    """Count the processes that compose rows unless another number is asked for."""
    return max(1, (os.cpu_count() or 2) - 1)
