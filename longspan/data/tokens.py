"""Tokens of the vocabulary as text, and marked text to token ids.

Rows are composed from token pieces, so every cut must fall where the tokenizer would cut the
joined text anyway. ``TokenTable`` answers that with one numpy lookup per question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

Part = tuple[str, "Kind"]
"""A stretch of text and what its tokens are."""


class Kind(IntEnum):
    """What a token is; training turns kinds into loss weights."""

    FILLER = 0
    """Natural text."""
    TEXT = 1
    """Planted sentences, questions, chat control."""
    PLANTED = 2
    """A random value at its first mention: cannot be predicted."""
    ANSWER = 3
    """An answer and the token that ends it."""
    COPY = 4
    """Text that repeats an earlier span (second mentions, long-range tasks)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Token ids with the kind of each: ``ids`` uint32 [T], ``kinds`` uint8 [T]."""

    ids: np.ndarray
    kinds: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def concat(pieces: Sequence[Piece]) -> Piece:
    """Pieces in order as one piece."""
    return Piece(np.concatenate([p.ids for p in pieces]), np.concatenate([p.kinds for p in pieces]))


def filler(ids: np.ndarray, kind: Kind = Kind.FILLER) -> Piece:
    """Token ids of one kind."""
    return Piece(ids.astype(np.uint32), np.full(len(ids), kind, np.uint8))


class TokenTable:
    """Per-token facts as arrays over the vocabulary [V], and marked encoding."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        size = tokenizer.get_vocab_size()
        texts = [tokenizer.decode([i], skip_special_tokens=False) for i in range(size)]
        self.texts = texts
        self.num_bytes = np.array([len(t.encode()) for t in texts], np.int32)
        self.ends_newline = np.array([t.endswith("\n") for t in texts])
        self.is_blank = np.array([t.isspace() for t in texts])
        self.has_newline = np.array(["\n" in t for t in texts])
        self.starts_newline = np.array([t.startswith(("\n", "\r")) for t in texts])
        self.ends_stop = np.array([t == "." for t in texts])
        self.starts_sentence = np.array(
            [len(t) > 1 and t[0] == " " and t[1].isupper() for t in texts])
        self.with_newline = np.array([self._with_newline(t) for t in texts], np.int32)

    @classmethod
    def load(cls, tokenizer_json: Path) -> TokenTable:
        """Table of a ``tokenizer.json`` on disk."""
        return cls(Tokenizer.from_file(str(tokenizer_json)))

    def _with_newline(self, text: str) -> int:
        """Id of ``text`` plus one newline where that is a single token, else -1."""
        if not text.endswith("\n"):
            return -1
        ids = self.tokenizer.encode(text + "\n", add_special_tokens=False).ids
        return ids[0] if len(ids) == 1 else -1

    def line_starts(self, ids: np.ndarray) -> np.ndarray:
        """Positions p, 0 < p < T-1, where a new line of text may be inserted before ids[p].

        The token before ends a line, and what follows does not merge with that line break.
        """
        current, after = ids[1:-1], ids[2:]
        follows = self.has_newline[current] & self.is_blank[current]
        follows |= self.starts_newline[current]
        follows |= self.is_blank[current] & self.has_newline[after] & self.is_blank[after]
        return np.flatnonzero(self.ends_newline[ids[:-2]] & ~follows) + 1

    def blank_line_places(self, ids: np.ndarray, lines: np.ndarray) -> np.ndarray:
        """Select of ``lines`` the places where another token for the line end makes a blank line.

        The token before that one is not blank: the tokenizer would merge it with the line end.
        """
        before = ids[np.maximum(lines - 2, 0)]
        is_alone = ~(self.is_blank[before] | self.ends_newline[before])
        return lines[(self.with_newline[ids[lines - 1]] >= 0) & is_alone]

    def sentence_starts(self, ids: np.ndarray) -> np.ndarray:
        """Positions p where a new sentence may be inserted before ids[p] (" The ...")."""
        return np.flatnonzero(self.ends_stop[ids[:-1]] & self.starts_sentence[ids[1:]]) + 1

    def encode(self, batch: Sequence[Sequence[Part]]) -> list[Piece]:
        """Encode each sequence of parts as one text; kinds follow the parts' characters."""
        texts = ["".join(text for text, _ in parts) for parts in batch]
        # One by one: encode_batch would start threads in each of the many workers that make rows.
        encodings = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [
            _mark(np.array(e.ids, np.uint32), e.offsets, parts)
            for e, parts in zip(encodings, batch, strict=True)]


def _mark(ids: np.ndarray, offsets: list[tuple[int, int]], parts: Sequence[Part]) -> Piece:
    """Kinds of tokens from the kinds of the characters they overlap (the later part wins)."""
    kinds = np.full(len(ids), Kind.TEXT, np.uint8)
    if len(parts) == 1:
        kinds[:] = parts[0][1]
        return Piece(ids, kinds)
    ends = np.array([end for _, end in offsets], np.int64)
    start = 0
    for text, kind in parts:
        stop = start + len(text)
        if kind != Kind.TEXT:
            first = int(np.searchsorted(ends, start, side="right"))
            last = int(np.searchsorted(ends, stop, side="left"))
            kinds[first : last + 1] = kind
        start = stop
    return Piece(ids, kinds)
