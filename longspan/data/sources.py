"""Text files on disk to long documents: find, filter, clean, group by package, split.

A *document* is the concatenation of one package's (directory's) files, because a repository read
as a whole is the best natural source of long-range dependence (ProLong, Qwen2.5-1M section 3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from longspan.errors import LongspanError
from longspan.text_files import read_text

SUFFIXES = frozenset({".py", ".md", ".rst", ".txt", ".html", ".pod", ".c", ".h", ".toml"})
MIN_BYTES = 400
MAX_BYTES = 1_500_000
HELD_OUT_PERCENT = 2
_SKIP_DIRS = frozenset({"site-packages", "__pycache__", "node_modules", "test", "tests"})
_SKIP_TAGS = frozenset({"script", "style", "head", "nav", "svg"})
_BLOCK_TAGS = frozenset({"p", "div", "li", "tr", "h1", "h2", "h3", "h4", "pre", "br", "dt", "dd"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Root:
    """One directory to read and how much of it to take."""

    path: Path
    max_bytes: int
    """Upper bound on the text taken from this root, in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One long document of a single split."""

    name: str
    text: str
    is_held_out: bool


class _TextExtractor(HTMLParser):
    """Collects the visible text of an HTML page, one block element per line."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in _SKIP_TAGS:
            self._skipped += 1
        elif tag in _BLOCK_TAGS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIP_TAGS:
            self._skipped = max(0, self._skipped - 1)

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.pieces.append(data)


def html_to_text(page: str) -> str:
    """Visible text of an HTML page with runs of blank lines collapsed."""
    parser = _TextExtractor()
    parser.feed(page)
    lines = [line.rstrip() for line in "".join(parser.pieces).splitlines()]
    kept = [a for a, b in zip(lines, ["x", *lines], strict=False) if a or b]
    return "\n".join(kept)


def is_clean(text: str) -> bool:
    """Return whether text is a person's: mostly ASCII, normal lines, no chat control tokens."""
    if "<|" in text or "\x00" in text:
        return False
    lines = text.count("\n") + 1
    if len(text) / lines > 160 or max(map(len, text.split("\n"))) > 4_000:
        return False
    sample = text[:20_000]
    good = sum(c.isascii() and (c.isprintable() or c in "\n\t") for c in sample)
    letters = sum(c.isalpha() or c == " " for c in sample)
    return good > 0.97 * len(sample) and letters > 0.5 * len(sample)


def clean_text(path: Path) -> str | None:
    """Read and clean a file, ending in one newline; None when the filters refuse it."""
    if path.is_symlink():
        return None
    try:
        text = read_text(path, MAX_BYTES)
    except LongspanError:
        return None  # one of many files; `read_documents` reports when none is left
    if path.suffix == ".html":
        text = html_to_text(text)
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if len(text) < MIN_BYTES or not is_clean(text):
        return None
    return text + "\n"


def is_held_out(name: str) -> bool:
    """Stable split by the hash of a root-relative path: HELD_OUT_PERCENT of all files."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "little") % 100 < HELD_OUT_PERCENT


def iter_files(root: Path) -> Iterator[Path]:
    """Candidate files below ``root`` in sorted order."""
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root).parts[:-1]
        if path.suffix in SUFFIXES and not _SKIP_DIRS.intersection(inside) and path.is_file():
            yield path


def _package(path: Path, root: Path) -> str:
    """Document a file belongs to: the first two directories below the root."""
    parts = path.relative_to(root).parts[:-1]
    return "/".join((root.name, *parts[:2]))


def read_root(root: Root, seen: set[bytes]) -> list[Document]:
    """Documents of one root: files grouped by package and split, packages in hash order.

    ``seen`` holds the content hashes of earlier files and is extended: duplicates are dropped.
    """
    if not root.path.is_dir():
        raise LongspanError(f"corpus root {root.path} is not a directory: pass an existing one")
    groups: dict[tuple[str, bool], list[Path]] = {}
    for path in iter_files(root.path):
        relative = str(path.relative_to(root.path))
        groups.setdefault((_package(path, root.path), is_held_out(relative)), []).append(path)
    order = sorted(groups, key=lambda k: hashlib.sha256(repr(k).encode()).digest())
    documents: list[Document] = []
    taken = 0
    for package, held_out in order:
        text = "".join(_fresh_texts(groups[package, held_out], seen))
        if text and taken < root.max_bytes:
            text = text[: root.max_bytes - taken].rstrip() + "\n"
            taken += len(text)
            documents.append(Document(name=package, text=text, is_held_out=held_out))
    return documents


def _fresh_texts(paths: Iterable[Path], seen: set[bytes]) -> Iterator[str]:
    for path in paths:
        text = clean_text(path)
        if text is None:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


def read_documents(roots: Iterable[Root]) -> list[Document]:
    """All documents of all roots, duplicates dropped across roots."""
    seen: set[bytes] = set()
    roots = list(roots)
    documents = [document for root in roots for document in read_root(root, seen)]
    if not documents:
        names = ", ".join(str(root.path) for root in roots)
        raise LongspanError(f"{names}: no text that can be used (files in UTF-8 of {MIN_BYTES:,} "
                            f"to {MAX_BYTES:,} bytes named {', '.join(sorted(SUFFIXES))})")
    return documents
