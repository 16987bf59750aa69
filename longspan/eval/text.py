"""Real text for prompts: files, cut into pieces that are encoded once each.

Prompts are put together from pieces of text that are cut only where the tokenizer cuts anyway, so
that the ids of a prompt are those of its text, however long it is. Nothing here knows the engine.
"""

from __future__ import annotations

import hashlib
import random
import re
import sysconfig
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from longspan.errors import LongspanError

TEXT_SUFFIXES = (".py", ".txt", ".rst", ".md")
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests",
                             "idlelib", "lib2to3"})
MIN_PIECE_CHARS = 256
MAX_LINE_CHARS = 2000
MAX_FILE_BYTES = 2_000_000
SPECIAL_MARK = "<|"
"""Text that holds it is left out: tokenizers read control tokens into it."""
# A line end is a border of tokens if the next line is not blank: runs of white space that hold
# line ends are one token, indentation after a line end is another.
LINE_BORDER = re.compile(r"(?<=\n)(?=[^\S\n]*\S)")
HELD_OUT_PACKAGES = ("anyio", "click", "filelock", "jinja2", "markdown_it", "mpmath", "packaging",
                     "psutil", "pygments", "rich", "tqdm", "typer", "yaml")
"""Packages that are installed with this one, and that no training text of nano holds."""


class TextTokenizer(Protocol):
    """What the evaluation needs of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        """Return the token ids of a text, with the tokens that frame a plain prompt or without
        them."""

    def render_chat(self, messages: Sequence[Mapping[str, Any]], /) -> str:
        """Render the prompt for a conversation."""


class Piece(NamedTuple):
    """A part of a prompt."""

    text: str
    ids: np.ndarray
    """[T] int32."""


class Encoder:
    """Text to pieces, without the special tokens that a whole prompt may begin with."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self._cached: dict[str, Piece] = {}

    def piece(self, text: str) -> Piece:
        """Return the text and its token ids."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return Piece(text, np.asarray(ids, np.int32))

    def cached(self, text: str) -> Piece:
        """Return the same, remembered: for what many prompts hold."""
        if text not in self._cached:
            self._cached[text] = self.piece(text)
        return self._cached[text]

    def count(self, text: str) -> int:
        """Count the tokens of the text."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def opening(self) -> Piece:
        """Return what the tokenizer puts in front of a plain prompt: a beginning-of-text token, or
        nothing."""
        return Piece("", np.asarray(self.tokenizer.encode("", add_special_tokens=True), np.int32))


class TextBank:
    """Files of real text, encoded once each, when first needed."""

    def __init__(self, files: Sequence[Path], tokenizer: TextTokenizer) -> None:
        if not files:
            raise LongspanError("there is no text to build a document from; name a folder of "
                                f"{', '.join(TEXT_SUFFIXES)} files with --text-root")
        self._files = tuple(files)
        self._encoder = Encoder(tokenizer)
        self._pieces: dict[int, list[Piece]] = {}

    @classmethod
    def from_roots(cls, roots: Sequence[Path], tokenizer: TextTokenizer) -> TextBank:
        """Take all text files under the folders; raises `LongspanError` for one that is missing."""
        for root in roots:
            if not root.is_dir():
                raise LongspanError(f"{root}: no such folder of texts")
        return cls([file for root in roots for file in find_texts(root)], tokenizer)

    @property
    def fingerprint(self) -> str:
        """Changes when other files are read."""
        names = "\n".join(f"{file.name} {file.stat().st_size}" for file in self._files)
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    def count(self, enough: int) -> int:
        """Count the tokens of all files, but no further than ``enough``."""
        total = 0
        for index in range(len(self._files)):
            total += sum(len(piece.ids) for piece in self._of_file(index))
            if total >= enough:
                return enough
        return total

    def take(self, rng: random.Random, num_tokens: int) -> list[Piece]:
        """Take pieces of whole files in random order, at least `num_tokens` tokens and one piece of
        them; repeated if they run out."""
        pieces: list[Piece] = []
        length = 0
        while length < num_tokens or not pieces:
            order = list(range(len(self._files)))
            rng.shuffle(order)
            before = len(pieces)
            for index in order:
                if length < num_tokens or not pieces:
                    pieces += self._of_file(index)
                    length += sum(len(piece.ids) for piece in self._of_file(index))
            if len(pieces) == before:
                raise LongspanError(f"none of the {len(order)} text files is UTF-8 prose or code")
        return pieces

    def _of_file(self, index: int) -> list[Piece]:
        if index not in self._pieces:
            text = read_text(self._files[index])
            self._pieces[index] = [self._encoder.piece(part) for part in split_pieces(text or "")]
        return self._pieces[index]


def find_texts(root: Path) -> Iterator[Path]:
    """Yield text files under a folder in a fixed order, tests and installed packages left out."""
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name not in SKIPPED_FOLDERS and not path.name.startswith("."):
                yield from find_texts(path)
        elif path.suffix in TEXT_SUFFIXES and path.is_file():
            yield path


def python_text_roots() -> list[Path]:
    """Return folders of text that is on every machine which runs this program: Python's own
    library."""
    return [Path(sysconfig.get_paths()["stdlib"])]


def held_out_roots() -> list[Path]:
    """Return folders of text that comes with this program and that nano was not trained on.

    Raises `LongspanError` where none of it is installed as source files.
    """
    folder = Path(sysconfig.get_paths()["purelib"])
    found = [folder / name for name in HELD_OUT_PACKAGES if (folder / name).is_dir()]
    if not found:
        raise LongspanError(f"{folder}: none of {', '.join(HELD_OUT_PACKAGES)} is there to make "
                            "haystacks of; name a folder of texts with --text-root")
    return found


def read_text(file: Path) -> str | None:
    """Read the text of a file with one line end at its end; None if it is no text fit for
    reading."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            return None
        text = file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    text = unicodedata.normalize("NFC", "\n".join(text.splitlines())).strip("\n") + "\n"
    if not text.strip() or SPECIAL_MARK in text:
        return None
    longest = max(map(len, text.split("\n")))
    return text.lstrip() if longest <= MAX_LINE_CHARS else None


def split_pieces(text: str) -> Iterator[str]:
    """Yield groups of lines of at least `MIN_PIECE_CHARS`, cut at borders of tokens."""
    piece = ""
    for line in LINE_BORDER.split(text):
        piece += line
        if len(piece) >= MIN_PIECE_CHARS:
            yield piece
            piece = ""
    if piece:
        yield piece
