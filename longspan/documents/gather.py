"""Files and folders that a person names, as documents under short names.

What is not taken is listed with its reason. What was named itself, and not only lies in a folder
that was, must be readable: else it is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longspan.documents.files import printable
from longspan.documents.formats import PDF, WORD, UnreadableError, read_file
from longspan.documents.ignore import IgnoreRules
from longspan.errors import LongspanError
from longspan.text_files import STANDARD_INPUT, read_standard_input

MAX_TEXT_BYTES = 2**26
"""Longer text files are left out: twelve times what a million tokens hold."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the name that it has in the prompt."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file, or a folder with all that is in it (its name then ends with a slash)."""

    name: str
    reason: str


@dataclass(slots=True)
class Gathering:
    """What was found, in the order in which it was named, folders by name."""

    documents: list[Document] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def gather(paths: Sequence[str]) -> Gathering:
    """Read all files and folders. ``-`` is standard input.

    Raises `LongspanError` for a path that is not there, a file named that cannot be read, and where
    no text is found at all.
    """
    return _Gatherer(paths).gather()


def as_prompt(documents: Sequence[Document]) -> str:
    """Return one text of all documents, each under its name."""
    return "\n\n".join(f"===== {one.name} =====\n{one.text}" for one in documents)


class _Gatherer:
    """Reads each file once, whichever way it was named."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._found = Gathering()
        self._seen = set[Path]()
        self._names = set[str]()

    def gather(self) -> Gathering:
        """Read everything; errors as `gather`."""
        for name in self._paths:
            if name == "-":
                self._add(STANDARD_INPUT, read_standard_input(), is_named=True)
            else:
                self._take(name)
        if not self._found.documents:
            raise LongspanError(f"{', '.join(self._paths)}: no text there ({self._reasons()}); "
                                "name files or folders of text")
        return self._found

    def _take(self, name: str) -> None:
        path = Path(os.path.expanduser(name))
        if not name or not os.path.exists(path):
            raise LongspanError(f"{name or 'an empty name'}: no such file or folder")
        if path.is_dir():
            folder = Path(os.path.abspath(path))
            for file, shown in self._walk(folder, IgnoreRules.above(folder), folder.name):
                self._read(file, shown, named_as=None)
        else:
            self._read(Path(os.path.abspath(path)), path.name, named_as=name)

    def _walk(self, folder: Path, rules: IgnoreRules, shown: str) -> Iterator[tuple[Path, str]]:
        """Yield files and their names; note what is not even opened."""
        rules = rules.inside(folder)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: (entry.is_dir(), entry.name))
        except OSError as error:
            self._leave(f"{shown}/", f"a folder that cannot be read ({error.strerror})")
            return
        for entry in entries:
            name, path = printable(f"{shown}/{entry.name}"), Path(entry.path)
            is_folder = entry.is_dir(follow_symlinks=False)
            reason = _refusal(entry, rules)
            if reason and entry.name != ".git":
                self._leave(f"{name}/" if is_folder else name, reason)
            elif not reason and is_folder:
                yield from self._walk(path, rules, name)
            elif not reason:
                yield path, name

    def _read(self, path: Path, shown: str, named_as: str | None) -> None:
        """Read one file. ``named_as``: how it was named itself, None: found in a folder."""
        if path.resolve() in self._seen:
            self._leave(shown, "named twice")
            return
        self._seen.add(path.resolve())
        if shown in self._names:  # two files of one name: told apart by their whole paths
            shown = named_as or str(path)
        try:
            _check_size(path)
            text, _ = read_file(path)
        except UnreadableError as error:
            if named_as is not None:
                raise LongspanError(f"{named_as}: {error}; leave it out or convert it to UTF-8 "
                                    "text") from None
            self._leave(shown, str(error))
            return
        self._add(shown, text, is_named=named_as is not None)

    def _add(self, name: str, text: str, *, is_named: bool) -> None:
        text = text.replace("\r\n", "\n").strip("\n").rstrip()
        if text.strip():
            self._names.add(name)
            self._found.documents.append(Document(name, text))
        elif is_named:
            raise LongspanError(f"{name}: the document is empty; give some text")
        else:
            self._leave(name, "empty")

    def _leave(self, name: str, reason: str) -> None:
        self._found.left_out.append(LeftOut(name, reason))

    def _reasons(self) -> str:
        reasons = [one.reason for one in self._found.left_out]
        return ", ".join(f"{reasons.count(reason):,} {reason}"
                         for reason in dict.fromkeys(reasons)) or "nothing there"


def _refusal(entry: os.DirEntry[str], rules: IgnoreRules) -> str | None:
    """Why something in a folder is not even opened."""
    if entry.is_symlink():
        return "a link"
    if entry.name.startswith("."):
        return "hidden"
    if rules.ignores(Path(entry.path), is_folder=entry.is_dir()):
        return "ignored by .gitignore"
    return None if entry.is_dir() or entry.is_file() else "no file"


def _check_size(path: Path) -> None:
    """Raise `UnreadableError` for a text that no model reads."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UnreadableError(f"cannot be read ({error.strerror})") from None
    if size > MAX_TEXT_BYTES and path.suffix.lower() not in (PDF, WORD):
        raise UnreadableError(f"larger than {MAX_TEXT_BYTES >> 20} MiB")
