"""Text as a corpus on disk, for every command that makes training data of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from longspan.commands.console import note, show_table
from longspan.data.corpus import write_corpus
from longspan.data.documents import Reader, Reading, Root, describe_roots, num_source_bytes
from longspan.data.filters import Filters, Refusal
from longspan.data.intake import Intake
from longspan.data.source import Source, load_source
from longspan.data.tokens import load_tokenizer
from longspan.errors import LongspanError
from longspan.files.whole import check_is_folder, replaced

CORPUS, TOKENIZER, CARD = "corpus", "tokenizer", "card.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusJob:
    """Which text becomes a corpus, and how."""

    roots: Sequence[Root]
    reading: Reading
    filters: Filters
    tokenizer: Path
    out: Path
    """Folder of the corpus and of what is made of it."""
    held_out: float
    """Share of the documents that is set aside."""
    may_join: bool = False
    """Whether short documents may be read as one."""
    licence: str = "not stated"

    @property
    def identity(self) -> str:
        """Digest of everything that the corpus depends on."""
        tokenizer = load_tokenizer(self.tokenizer).to_str()
        text = json.dumps([describe_roots(self.roots, self.reading), asdict(self.filters),
                           self.held_out, hashlib.sha256(tokenizer.encode()).hexdigest()])
        return hashlib.sha256(text.encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Return what a card says of it."""
        return {"licence": self.licence, "tokenizer": str(self.tokenizer),
                "filters": asdict(self.filters), "sources": [root.path for root in self.roots]}


def prepare_corpus(job: CorpusJob) -> dict[str, Any]:
    """Write corpus and tokenizer where an earlier run has not; returns the corpus' counts.

    Raises `LongspanError` when there is no text, or the folder holds other things.
    """
    check_out(job.out)
    made_from = job.identity
    meta = read_json(job.out / CORPUS / "meta.json")
    if meta is None:
        meta = _make_corpus(job, made_from)
    elif meta.get("made_from") != made_from:
        raise made_otherwise(job.out / CORPUS)
    print_table(meta["table"])
    if meta["num_unknown_tokens"]:
        note(f"{meta['num_unknown_tokens']:,} tokens are unknown: the tokenizer cannot spell all "
             "of the text")
    tokenizer_dir = job.out / TOKENIZER
    tokenizer_dir.mkdir(exist_ok=True)
    with replaced(tokenizer_dir / "tokenizer.json") as part:
        part.write_text(load_tokenizer(job.tokenizer).to_str(), encoding="utf-8")
    return meta


def check_out(out: Path) -> None:
    """Raise `LongspanError` for a folder that has other things than ours."""
    check_is_folder(out)
    if out.is_dir() and any(out.iterdir()) and not any(
            (out / name).exists() for name in (CORPUS, f"{CORPUS}.part")):
        raise LongspanError(f"{out} has other files: name a new folder")


def made_otherwise(path: Path) -> LongspanError:
    """Make the error for a folder that holds what other options made."""
    return LongspanError(
        f"{path} was made from other files or options: repeat these to go on, or name a new folder")


def claim(file: Path, identity: Mapping[str, Any]) -> None:
    """Say in a file what a folder is made of. Raises `LongspanError` when it says otherwise."""
    identity = json.loads(json.dumps(identity, default=dict))
    if read_json(file) not in (None, identity):
        raise made_otherwise(file.parent)
    with replaced(file) as part:
        part.write_text(json.dumps(identity, indent=1))


def read_json(file: Path) -> dict[str, Any] | None:
    """Return the object in a file; None where there is no file."""
    return json.loads(file.read_text()) if file.is_file() else None


def _make_corpus(job: CorpusJob, made_from: str) -> dict[str, Any]:
    """Read, filter and tokenise; nothing stays of it when there is no text."""
    intake = Intake()
    is_new = not job.out.exists()
    tokenizer = load_tokenizer(job.tokenizer)
    try:
        with progress("reading", num_source_bytes(job.roots)) as advance:
            reader = Reader(job.reading, Refusal(job.filters), intake, advance)
            write_corpus(reader.read(job.roots), tokenizer, job.out / CORPUS, intake,
                         job.held_out, {"made_from": made_from})
    except LongspanError:
        if is_new:
            shutil.rmtree(job.out, ignore_errors=True)
        raise
    return read_json(job.out / CORPUS / "meta.json") or {}


def open_source(out: Path, split: str, may_join: bool) -> Source:
    """Return a split of what was written."""
    return replace(load_source(out, split), may_join=may_join)


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
