"""Finished samples on disk, one JSON object a line, only ever appended to; the run's manifest."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from longspan.errors import LongspanError
from longspan.eval.task import Gold

MANIFEST, SAMPLES = "run.json", "samples.jsonl"
SCHEMA = "eval-run/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One prompt and what came of it. Prompts are not kept: task, length, seed and index build them
    again, and the hash says whether they are the same."""

    key: str
    """Identifies the prompt within its run; a run takes samples with the same key as done."""
    task: str
    num_tokens: int | None
    """Prompt and answer budget that was asked for; None: as long as the data is."""
    index: int
    """The document's place among those of its length."""
    prompt_tokens: int
    ids_sha256: str
    positions: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    form: str = ""
    text: str = ""
    score: float | None = None
    hits: tuple[bool, ...] = ()
    label: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    status: str = "ok"
    """``ok``, or why there is no answer: ``error``, ``timeout``, ``oom``."""
    error: str = ""
    density: float | None = None
    ttft_s: float | None = None
    """None also where something else shared the device, so that times mean nothing."""
    total_s: float | None = None
    num_cached_tokens: int = 0
    answer_nll: float | None = None
    """Nats a token of the right answer, where it was scored."""

    @property
    def depth(self) -> float | None:
        """Where the fact asked for stands, from 0 to 1; None unless there is exactly one."""
        return self.positions[0] / self.prompt_tokens if len(self.positions) == 1 else None

    @property
    def gold(self) -> Gold:
        """What the answer is scored against."""
        return Gold(answers=self.answers, facts=self.facts)


class RunFolder:
    """The files of one run. Open it to write; one process at a time may.

    Raises `LongspanError` where the folder cannot be written or another run writes to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._file: Any = None

    def __enter__(self) -> Self:
        path = self.folder / SAMPLES
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise LongspanError(f"{self.folder}: another run is writing there; wait for it, or "
                                "choose another folder with --out") from None
        except OSError as error:
            raise _unwritable(self.folder, error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, samples: Iterable[Sample]) -> None:
        """Write samples, at once and whole. Safe from several threads."""
        lines = "".join(_dump(sample) for sample in samples).encode()
        with self._lock:
            try:
                self._finish_torn_line()
                self._file.write(lines)
                self._file.flush()
            except OSError as error:
                raise _unwritable(self.folder, error) from None

    def read(self) -> dict[str, Sample]:
        """Read the samples by key. The first answer to a prompt counts, whatever comes later;
        failures count until there is one. Lines cut short by a crash are left out."""
        found: dict[str, Sample] = {}
        path = self.folder / SAMPLES
        if not path.is_file():
            return found
        for line in path.read_text(encoding="utf-8").split("\n"):
            sample = _parse(line)
            if sample is not None and found.get(sample.key, sample).status != "ok":
                found[sample.key] = sample
            elif sample is not None:
                found.setdefault(sample.key, sample)
        return found

    def manifest(self) -> dict[str, Any]:
        """Read what the run is about; empty before there is one. Raises `LongspanError` for a file
        that is no manifest."""
        path = self.folder / MANIFEST
        if not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError):
            content = None
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise LongspanError(f"{path}: not the manifest of a run; choose another folder")
        return content

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace a file of the folder, at once."""
        path = self.folder / name
        part = path.with_suffix(".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
            os.replace(part, path)
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def _finish_torn_line(self) -> None:
        """End a line that a crash cut short, so that it does not swallow the next one."""
        size = self._file.seek(0, os.SEEK_END)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")


def open_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """Open finished or unfinished runs to read. Raises `LongspanError` where there is none."""
    runs = [RunFolder(folder) for folder in folders]
    for run in runs:
        if not run.manifest():
            raise LongspanError(f"{run.folder}: no run there (no {MANIFEST}); name folders that "
                                "longspan eval run wrote")
    return runs


def _dump(sample: Sample) -> str:
    default = {item.name: item.default for item in fields(Sample)}
    content = {name: value for name, value in asdict(sample).items()
               if value != default[name] and value not in ((), {})}
    return json.dumps(content, ensure_ascii=False) + "\n"


def _parse(line: str) -> Sample | None:
    try:
        content = json.loads(line)
        for name in ("positions", "answers", "hits"):
            content[name] = tuple(content.get(name, ()))
        return Sample(**content)
    except (json.JSONDecodeError, TypeError, AttributeError):
        return None


def _unwritable(folder: Path, error: OSError) -> LongspanError:
    return LongspanError(f"{folder}: cannot be written ({error.strerror}); what was written before "
                         "is kept: make room or choose another folder with --out, and run again")
