"""`longspan bench documents`: a folder of files and a PDF, asked by `longspan generate --sources`.

The command runs as a person types it, in a process of its own. An answer is right that holds the
words asked for; its file is right where the first source names the file that they stand in, its
passage where the first source holds those words too and lies where the house's text is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from longspan.bench.documents.houses import KINDS, Asked, make_houses, write_folder, write_report
from longspan.bench.session import BenchSession
from longspan.commands.console import note, percent, show_table
from longspan.documents.formats import read_file
from longspan.documents.words import words
from longspan.errors import LongspanError
from longspan.eval.stats import wilson_interval

MAX_TOKENS = 32
WHAT = ("folder", "pdf")
METRICS = ("answer", "file", "passage")
Score = Callable[[dict[str, Any], Asked, str], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentsOptions:
    """What is asked, and of whom."""

    model: str
    what: tuple[str, ...]
    """``folder``, ``pdf``, or both."""
    num_files: int
    """Files of the folder."""
    num_pages: int
    """Pages of the PDF."""
    num_questions: int
    """About each of the two."""
    seed: int
    attention: str = "auto"
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in self.what:
            if name not in WHAT:
                raise LongspanError(f"--what: {name!r} is not one of {', '.join(WHAT)}")
        for name in ("num_files", "num_pages"):
            if not 1 <= getattr(self, name) <= len(KINDS):
                raise LongspanError(f"--{name.removeprefix('num_')} must be 1 to {len(KINDS)}, not "
                                    f"{getattr(self, name)}")


def run(session: BenchSession, options: DocumentsOptions) -> int:
    """Ask about what is wanted, write rows, print the table. Returns the exit status."""
    with TemporaryDirectory(prefix="longspan-documents-") as name:
        folder = Path(name)
        if "folder" in options.what:
            houses = make_houses(options.num_files, options.seed)
            _measure(session, options, folder, "houses", write_folder(
                folder / "houses", houses, options.num_questions))
        if "pdf" in options.what:
            pages = make_houses(options.num_pages, options.seed + 1)
            _measure(session, options, folder, "report.pdf", write_report(
                folder / "report.pdf", pages, options.num_questions))
    show(session.rows)
    return session.finish()


def _measure(
    session: BenchSession, options: DocumentsOptions, folder: Path, path: str,
    asked: Sequence[Asked],
) -> None:
    """Ask about one path; a row for each metric, or one that says why there are none."""
    outputs = list[dict[str, Any]]()

    def scored(metric: str) -> dict[str, Any]:
        outputs.extend(() if outputs else ask(options, folder, path, asked))
        return row(metric, outputs, asked, folder)

    for metric in METRICS:
        key = {"model": Path(options.model).name, "documents": path, "metric": metric,
               "attention": options.attention}
        if session.attempt(key, partial(scored, metric)) is None:
            break


def ask(
    options: DocumentsOptions, folder: Path, path: str, asked: Sequence[Asked]
) -> list[dict[str, Any]]:
    """Run `longspan generate` once for all questions. Raises `LongspanError` with its own words."""
    questions = [word for one in asked for word in ("--question", one.question)]
    command = ["generate", options.model, "--document", str(folder / path), *questions,
               "--sources", "--json", "--temperature", "0",
               "--max-tokens", str(MAX_TOKENS), "--attention", options.attention,
               "--device", options.device,
               *(("--threads", str(options.threads)) if options.threads else ())]
    note(f"longspan generate --document {path}, {len(asked)} questions")
    done = subprocess.run([sys.executable, "-m", "longspan", *command],
                          capture_output=True, encoding="utf-8")
    if done.returncode:
        raise LongspanError(
            (done.stderr.strip().splitlines() or ["no word why"])[-1].removeprefix("error: "))
    return [json.loads(line) for line in done.stdout.splitlines()]


def row(
    metric: str, outputs: Sequence[dict[str, Any]], asked: Sequence[Asked], folder: Path
) -> dict[str, Any]:
    """Score what was answered; the share that is right with Wilson's interval of 95 %."""
    texts = {file: _text_of(folder / file) for file in {one.file for one in asked}}
    right = [SCORES[metric](output, one, texts[one.file])
             for output, one in zip(outputs, asked, strict=True)]
    low, high = wilson_interval(sum(right), len(right))
    first = outputs[0]
    return {"n": len(right), "score": round(sum(right) / len(right), 4), "ci_low": round(low, 4),
            "ci_high": round(high, 4), "num_documents": len(first["documents"]),
            "num_tokens": first["num_prompt_tokens"], "ttft_s": round(first["ttft_s"], 2),
            "next_ttft_s": round(max((one["ttft_s"] for one in outputs[1:]), default=0.0), 2),
            "wrong": [{"question": one.question, "said": output["text"]}
                      for one, output, is_right in zip(asked, outputs, right, strict=True)
                      if not is_right]}


def _text_of(file: Path) -> str:
    """Return the text as `generate` has it: sources are counted in its characters."""
    return read_file(file)[0].replace("\r\n", "\n").strip("\n").rstrip()


def _is_answered(output: dict[str, Any], one: Asked, text: str) -> bool:
    return _says(output["text"].replace(",", ""), one.answer)


def _says(text: str, answer: str) -> bool:
    """Whether the answer's words stand in a text, in their order."""
    said, wanted = words(text), words(answer)
    return any(said[place : place + len(wanted)] == wanted for place in range(len(said)))


def _is_named(output: dict[str, Any], one: Asked, text: str) -> bool:
    first = output["sources"][:1]
    return bool(first) and not first[0]["is_asked"] and first[0]["name"] == one.file


def _is_found(output: dict[str, Any], one: Asked, text: str) -> bool:
    if not _is_named(output, one, text):
        return False
    start, stop = output["sources"][0]["start"], output["sources"][0]["stop"]
    begin = text.index(one.title)
    end = text.find("History of ", begin + len(one.title))
    middle = (start + stop) // 2
    return _says(text[start:stop], one.answer) and begin <= middle < (len(text) if end < 0 else end)


SCORES: dict[str, Score] = {"answer": _is_answered, "file": _is_named, "passage": _is_found}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the scores as a table on stdout."""
    show_table("answers out of documents", (
        "documents", "files", "tokens", "right", "n", "share", "95 %"), [
        (one["documents"], str(one["num_documents"]), f"{one['num_tokens']:,}", one["metric"],
         str(one["n"]), percent(one["score"]),
         f"{percent(one['ci_low'])} to {percent(one['ci_high'])}")
        for one in rows if "error" not in one])
