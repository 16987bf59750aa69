"""What every task of the evaluation shares: prompts of an exact length out of real text.

Token ids are put together from pieces of text that are cut only where the tokenizer cuts anyway,
so that the ids of a prompt are those of its text, however long it is, at the price of encoding
each piece once. Nothing here knows the engine: a tokenizer and a `Generate` are passed in.
"""

from __future__ import annotations

import hashlib
import random
import re
import sysconfig
import unicodedata
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from longspan.errors import LongspanError

TEXT_SUFFIXES = (".py", ".txt", ".rst", ".md")
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests",
                             "idlelib", "lib2to3"})
MIN_PIECE_CHARS = 256
MAX_LINE_CHARS = 2000
MAX_FILE_BYTES = 2_000_000
ENDINGS = ("", ".", " a", " a.", " a b", " a b c")
MAX_ENDING_TRIES = 64
SPECIAL_MARK = "<|"
"""Text that holds it is left out: tokenizers read control tokens into it."""
# A line end is a border of tokens if the next line is not blank: runs of white space that hold
# line ends are one token, indentation after a line end is another.
LINE_BORDER = re.compile(r"(?<=\n)(?=[^\S\n]*\S)")


class TextTokenizer(Protocol):
    """What the evaluation needs of a tokenizer."""

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a text as it stands, without special tokens around it: it may be a piece
        of a prompt."""

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt for a conversation, the special tokens in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model said to one prompt."""

    text: str
    num_cached_tokens: int = 0
    """Prompt tokens that did not have to be computed again."""
    density: float | None = None
    ttft_s: float | None = None


class Generate(Protocol):
    """A model under test: greedy answers to prompts that share a long beginning."""

    def __call__(self, prompts: Sequence[array[int]], max_tokens: int) -> Sequence[Answer]:
        """One answer for each prompt, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One prompt and its gold answer."""

    prompt_ids: array[int]
    question: str
    answer: str
    depth: float
    """Where the fact stands: 0 is the beginning of the prompt, 1 its end."""
    position: int
    """The same in tokens."""


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids of a text and where they may be cut."""

    ids: np.ndarray
    """[T] int32."""
    borders: np.ndarray
    """Places between pieces, 0 first and T last."""
    texts: tuple[str, ...]
    """The pieces."""


class TextBank:
    """Files of real text, encoded once each, when first needed."""

    def __init__(self, files: Sequence[Path], tokenizer: TextTokenizer) -> None:
        if not files:
            raise LongspanError("there is no text to build a document from; name a folder of "
                                f"{', '.join(TEXT_SUFFIXES)} files with --text-root")
        self._files = tuple(files)
        self._tokenizer = tokenizer
        self._documents: dict[int, Document | None] = {}

    @classmethod
    def from_roots(cls, roots: Sequence[Path], tokenizer: TextTokenizer) -> TextBank:
        """All text files under the folders; raises `LongspanError` for one that is missing."""
        for root in roots:
            if not root.is_dir():
                raise LongspanError(f"{root}: no such folder of texts")
        return cls([file for root in roots for file in find_texts(root)], tokenizer)

    @property
    def fingerprint(self) -> str:
        """Changes when other files are read."""
        names = "\n".join(f"{file.name} {file.stat().st_size}" for file in self._files)
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    def take(self, rng: random.Random, num_tokens: int) -> Document:
        """Whole files in random order, at least `num_tokens` of them; repeated if they run out."""
        parts: list[Document] = []
        length = 0
        while length < num_tokens:
            order = list(range(len(self._files)))
            rng.shuffle(order)
            before = length
            for index in order:
                document = self._document(index) if length < num_tokens else None
                if document is not None:
                    parts.append(document)
                    length += len(document.ids)
            if length == before:
                raise LongspanError(f"none of the {len(order)} text files is UTF-8 prose or code")
        return _join(parts)

    def _document(self, index: int) -> Document | None:
        if index not in self._documents:
            text = read_text(self._files[index])
            self._documents[index] = None if text is None else self._encode(text)
        return self._documents[index]

    def _encode(self, text: str) -> Document:
        texts = tuple(split_pieces(text))
        pieces = [np.asarray(self._tokenizer.encode(piece), np.int32) for piece in texts]
        borders = np.cumsum([0, *(len(piece) for piece in pieces)])
        return Document(np.concatenate(pieces), borders, texts)


def find_texts(root: Path) -> Iterator[Path]:
    """Text files under a folder in a fixed order, tests and installed packages left out."""
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name not in SKIPPED_FOLDERS and not path.name.startswith("."):
                yield from find_texts(path)
        elif path.suffix in TEXT_SUFFIXES and path.is_file():
            yield path


def python_text_roots() -> list[Path]:
    """Text that is on every machine which runs this program: Python's own library."""
    return [Path(sysconfig.get_paths()["stdlib"])]


def read_text(file: Path) -> str | None:
    """The text of a file with one line end at its end; None if it is no text fit for reading."""
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
    """Groups of lines of at least `MIN_PIECE_CHARS`, cut at borders of tokens."""
    piece = ""
    for line in LINE_BORDER.split(text):
        piece += line
        if len(piece) >= MIN_PIECE_CHARS:
            yield piece
            piece = ""
    if piece:
        yield piece


def chat_frame(tokenizer: TextTokenizer) -> tuple[str, str]:
    """What the chat template puts before and after a user's message. The first ends in a line
    end (or is empty), so that a document's tokens do not depend on it."""
    mark = "CONTENT-OF-THE-MESSAGE"
    prompt = tokenizer.render_chat([{"role": "user", "content": mark}])
    before, found, after = prompt.partition(mark)
    if not found:
        raise LongspanError("the chat template leaves the user's message out")
    return (before if not before or before.endswith("\n") else before + "\n"), after


def encode_array(tokenizer: TextTokenizer, text: str) -> np.ndarray:
    """Token ids [T] int32."""
    return np.asarray(tokenizer.encode(text), np.int32)


def insert_at(document: Document, stop: int, items: Sequence[tuple[float, np.ndarray]]
              ) -> tuple[np.ndarray, list[int]]:
    """The document up to the border `stop` with each item at the border nearest to its depth.

    Returns the ids and the place of each item in them, in the order of `items`.
    """
    borders = document.borders[: int(np.searchsorted(document.borders, stop, "right"))]
    places = [int(borders[np.abs(borders - depth * stop).argmin()]) for depth, _ in items]
    parts: list[np.ndarray] = []
    found = [0] * len(items)
    done = length = 0
    for index in sorted(range(len(items)), key=places.__getitem__):
        parts.append(document.ids[done:places[index]])
        length += places[index] - done
        done, found[index] = places[index], length
        parts.append(items[index][1])
        length += len(items[index][1])
    return np.concatenate([*parts, document.ids[done:stop]]), found


def last_border(document: Document, limit: int) -> tuple[int, str]:
    """The last border at or before `limit` tokens and the text of the piece that follows it."""
    index = bisect_right(document.borders, limit) - 1
    return int(document.borders[index]), document.texts[min(index, len(document.texts) - 1)]


def fit_ending(tokenizer: TextTokenizer, text: str, tail: str, num_tokens: int) -> str:
    """The beginning of `text`, on one line, such that it and `tail` are `num_tokens` together."""
    line = " ".join([*text.split(), *["and so on"] * MIN_PIECE_CHARS])

    def length(ending: str) -> int:
        return len(tokenizer.encode(ending + tail))

    low, high = 1, len(line)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if length(line[:middle]) <= num_tokens else (low, middle - 1)
    # One character more is mostly no or one token more; where it is not, a last word helps.
    for num_chars in range(low, max(0, low - MAX_ENDING_TRIES), -1):
        for last in ENDINGS:
            ending = line[:num_chars].rstrip() + last
            if length(ending) == num_tokens:
                return ending
    raise LongspanError(f"no text of exactly {num_tokens} tokens could be made with this tokenizer")


def _join(parts: Sequence[Document]) -> Document:
    lengths = np.cumsum([0, *(len(part.ids) for part in parts)])
    borders = [part.borders[:-1] + offset for part, offset in zip(parts, lengths, strict=False)]
    return Document(
        np.concatenate([part.ids for part in parts]), np.concatenate([*borders, lengths[-1:]]),
        tuple(text for part in parts for text in part.texts))
