"""Documents from folders, JSONL, Parquet and data sets of the Hugging Face hub.

A document is one file or one record, unless files are joined by their folders. Whatever cannot be
read is noted in the `Intake`; nothing is skipped without a reason.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from longspan.data.intake import Intake
from longspan.data.records import RECORD_SUFFIXES, hub_records, read_records
from longspan.documents.files import list_files, printable
from longspan.documents.formats import UnreadableError, read_file
from longspan.errors import LongspanError

HUB = "datasets:"
"""What a source begins with that is the name of a data set on the hub."""

Filter = Callable[[str], str | None]
"""Why a text is refused; None: it is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Root:
    """One source of text, and how much of it to take."""

    path: str
    """A folder, a file, or ``datasets:NAME`` (``datasets:NAME:CONFIG``)."""
    max_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How sources are read."""

    include: tuple[str, ...] = ("*",)
    """Shell patterns of file paths below the source; ``*`` also matches ``/``."""
    exclude: tuple[str, ...] = ()
    """The same, left out. Paths begin with ``/``: ``*/tests/*`` is any folder of that name."""
    column: str = "text"
    """Where records have their text."""
    split: str = "train"
    """Split of a data set on the hub."""
    join_depth: int | None = None
    """Join the files that have as many folders in common, below the source; None: one document a
    file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document, and the files it was made of."""

    name: str
    text: str
    source: str = ""
    num_files: int = 1
    num_bytes: int = 0
    """Bytes of these files."""


@dataclass(slots=True)
class Reader:
    """Reads documents; everything else goes to the intake."""

    reading: Reading
    refuses: Filter
    """Applied to each file or record."""
    intake: Intake
    on_bytes: Callable[[int], None] = lambda num_bytes: None
    """Told of each file or record that was read."""

    def read(self, roots: Sequence[Root]) -> Iterator[Document]:
        """Documents of all sources in order. Raises `LongspanError` for a source that is not there
        or cannot be read at all."""
        for root in roots:
            self.intake.begin(root.path)
            files = self._open(root)
            texts = within_budget(files, root.max_bytes, self.intake)
            yield from self._joined(root, texts)

    def _open(self, root: Root) -> Iterator[Document]:
        path = Path(root.path)
        if root.path.startswith(HUB):
            return self._records(hub_records(
                root.path.removeprefix(HUB), self.reading.split, self.reading.column), root.path)
        if path.is_dir():
            return self._folder(root, path)
        if not path.is_file():
            raise LongspanError(f"{root.path} is no file or folder: name one that is there")
        if is_record_file(path):
            return self._records(read_records(path, self.reading.column), root.path)
        return self._file(path, path.name, root.path)

    def _folder(self, root: Root, folder: Path) -> Iterator[Document]:
        names = list_files(folder, lambda error: self.intake.note(
            root.path, "a folder that cannot be read", str(error.filename), 0))
        if root.max_bytes is not None:
            names.sort(key=lambda name: _digest(
                _group(printable(name), self.reading.join_depth) or printable(name)))
        for file_name in names:
            path, name = folder / file_name, printable(file_name)
            fate = self._fate(name, path)
            if fate:
                self.intake.note(root.path, fate, name, path.lstat().st_size)
            elif is_record_file(path):
                try:
                    yield from self._records(
                        read_records(path, self.reading.column), root.path, f"{name}:")
                except LongspanError as error:
                    fate = str(error).split(": ", 1)[-1].split(";")[0]
                    self.intake.note(root.path, fate, name, path.stat().st_size)
            else:
                yield from self._file(path, name, root.path)

    def _fate(self, name: str, path: Path) -> str | None:
        """Why a file is not even opened."""
        if path.is_symlink() or not path.is_file():
            return "a link or no file"
        if any(part.startswith(".") for part in Path(name).parts):
            return "hidden"
        if not any(fnmatchcase(f"/{name}", pattern) for pattern in self.reading.include):
            return "not included"
        if any(fnmatchcase(f"/{name}", pattern) for pattern in self.reading.exclude):
            return "excluded"
        return None

    def _file(self, path: Path, name: str, source: str) -> Iterator[Document]:
        try:
            text, num_bytes = read_file(path)
        except UnreadableError as error:
            self.intake.note(source, str(error), name, path.lstat().st_size)
            return
        yield from self._checked(text, name, source, num_bytes)

    def _records(
        self, texts: Iterator[tuple[str | None, str]], source: str, prefix: str = ""
    ) -> Iterator[Document]:
        for index, (text, problem) in enumerate(texts):
            name = f"{prefix}{index}"
            if text is None:
                self.intake.note(source, problem, name, 0)
            else:
                yield from self._checked(text, name, source, len(text.encode()))

    def _checked(
        self, text: str, name: str, source: str, num_bytes: int
    ) -> Iterator[Document]:
        self.on_bytes(num_bytes)
        text = text.replace("\r\n", "\n").strip()
        reason = self.refuses(text) if text else "empty"
        if reason:
            self.intake.note(source, reason, name, num_bytes)
        else:
            yield Document(name=name, text=text + "\n", source=source, num_bytes=num_bytes)

    def _joined(self, root: Root, files: Iterator[Document]) -> Iterator[Document]:
        def group(document: Document) -> str:
            return _group(document.name, self.reading.join_depth) or document.name

        for name, members in itertools.groupby(files, group):
            parts = list(members)
            yield Document(
                name=f"{root.path}/{name}", text="".join(part.text for part in parts),
                source=root.path, num_files=len(parts),
                num_bytes=sum(part.num_bytes for part in parts))


def is_record_file(path: Path) -> bool:
    """Whether a file holds records: JSONL or Parquet by its name."""
    return path.name.endswith(RECORD_SUFFIXES)


def within_budget(
    documents: Iterator[Document], max_bytes: int | None, intake: Intake
) -> Iterator[Document]:
    """Return the files that fit the budget, in order; the others are noted."""
    taken = 0
    for document in documents:
        if max_bytes is not None and taken + len(document.text) > max_bytes:
            intake.note(document.source, "over the budget", document.name, document.num_bytes)
        else:
            taken += len(document.text)
            yield document


def describe_roots(roots: Sequence[Root], reading: Reading) -> str:
    """Digest of what would be read: names, sizes and times of files, not their content."""
    digest = hashlib.sha256(json.dumps([repr(roots), repr(reading)]).encode())
    for root in roots:
        path = Path(root.path)
        files = [path / name for name in list_files(path)] if path.is_dir() else [path]
        for file in files if not root.path.startswith(HUB) else ():
            status = file.lstat() if file.is_symlink() or file.exists() else None
            times = (status.st_size, status.st_mtime_ns) if status else ()
            digest.update(repr((str(file), times)).encode())
    return digest.hexdigest()


def num_source_bytes(roots: Sequence[Root]) -> int:
    """Size of the files of all sources."""
    total = 0
    for root in roots:
        path = Path(root.path)
        files = [path / name for name in list_files(path)] if path.is_dir() else [path]
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total


def _group(name: str, depth: int | None) -> str | None:
    """Return the folder that a file is joined in; None: it is a document itself."""
    return None if depth is None else "/".join(Path(name).parts[:-1][:depth]) or "."


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
