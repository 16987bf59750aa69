"""Tokens of the vocabulary as text, and marked text to token ids.

Rows are composed from token pieces, so every cut must fall where the tokenizer would cut the
joined text anyway. ``TokenTable`` answers that with one numpy lookup per question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from longspan.errors import LongspanError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|end|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>")
"""What ends a document, by the names that published tokenizers have for it."""
FIM_MARKS = (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
             ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), ("<PRE>", "<SUF>", "<MID>"))
"""Control tokens of fill-in-the-middle: prefix, suffix, middle."""
SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f", "\u0964")
MAX_LINE_LEN = 400
"""Where lines are longer on average, text is cut at sentences too."""

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
        size = max(tokenizer.get_vocab().values()) + 1
        self._before = _stripped_prefix(tokenizer)
        texts = _token_texts(tokenizer, size)
        self.texts = texts
        self.end = _known(tokenizer, ENDS)
        self.fim_marks = next((ids for ids in (
            [tokenizer.token_to_id(mark) for mark in marks] for marks in FIM_MARKS)
            if None not in ids), None)
        self.has_chat = None not in (
            tokenizer.token_to_id(IM_START), tokenizer.token_to_id(IM_END))
        """Whether the tokenizer knows ChatML."""
        self.num_bytes = np.array([len(t.encode()) for t in texts], np.int32)
        self.ends_newline = np.array([t.endswith("\n") for t in texts])
        self.is_blank = np.array([t.isspace() for t in texts])
        self.has_newline = np.array(["\n" in t for t in texts])
        self.starts_newline = np.array([t.startswith(("\n", "\r")) for t in texts])
        self.ends_stop = np.array([t == "." for t in texts])
        self.starts_sentence = np.array(
            [len(t) > 1 and t[0] == " " and t[1].isupper() for t in texts])
        self.ends_sentence = np.array([t.rstrip().endswith(SENTENCE_ENDS) for t in texts])
        self.starts_word = np.array([t[:1].isspace() or t[:1] > "\x7f" for t in texts])
        self.begins_character = np.array(
            [begins_character(tokenizer.id_to_token(i), t) for i, t in enumerate(texts)])
        self.with_newline = np.array([self._with_newline(t) for t in texts], np.int32)

    @classmethod
    def load(cls, tokenizer_json: Path) -> TokenTable:
        """Table of a ``tokenizer.json`` on disk."""
        return cls(load_tokenizer(tokenizer_json))

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

    def cut_places(self, ids: np.ndarray) -> np.ndarray:
        """Positions p where text may be cut before ids[p]: line starts; in text with few lines also
        ends of sentences; with few of them starts of words; else anywhere between characters."""
        places = self.line_starts(ids) if len(ids) > 2 else np.zeros(0, np.int64)
        whole = self.begins_character[ids[1:]]
        word = self.starts_word[ids[1:]] & whole
        for more in (self.ends_sentence[ids[:-1]] & word, word, whole):
            if len(places) * MAX_LINE_LEN >= len(ids):
                break
            places = np.union1d(places, np.flatnonzero(more) + 1)
        return places

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
        encodings = [self.tokenizer.encode(self._before + text, add_special_tokens=False)
                     for text in texts]
        skip = len(self._before)
        return [_mark(e, skip, parts) for e, parts in zip(encodings, batch, strict=True)]

    def text(self, ids: np.ndarray) -> str:
        """Text of token ids, control tokens included."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=False))


def load_tokenizer(file: Path) -> Tokenizer:
    """Return the tokenizer of a ``tokenizer.json`` or of the directory that has it. Raises
    `LongspanError`."""
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise LongspanError(f"no tokenizer {file}: name a tokenizer.json or its directory")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise LongspanError(f"{file} is no tokenizer: {error}") from None


def _known(tokenizer: Tokenizer, names: Sequence[str]) -> int | None:
    """Id of the first name that is a token."""
    ids = (tokenizer.token_to_id(name) for name in names)
    return next((i for i in ids if i is not None), None)


def begins_character(token: str | None, text: str) -> bool:
    """Whether a token's first byte is the first one of a character, not a later one in UTF-8.

    Tokens of parts of characters have no text of their own; their names are ``<0xE4>``, or one
    letter a byte (GPT-2's, see `_byte_letters`).
    """
    if not token or not text.startswith("\ufffd"):
        return True
    is_hex = len(token) == 6 and token.startswith("<0x")
    first = int(token[3:5], 16) if is_hex else _byte_letters().get(token[0], 0)
    return not 0x80 <= first < 0xC0


@cache
def _byte_letters() -> dict[str, int]:
    """Byte of each letter: printable ones stand for themselves, the others follow U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in plain}
    rest = sorted(set(range(256)) - set(plain))
    return letters | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _stripped_prefix(tokenizer: Tokenizer) -> str:
    """Return what to put before a text so that it is encoded as in the middle of another.

    SentencePiece's tokenizers begin each text with a space of their own.
    """
    first = tokenizer.encode("x", add_special_tokens=False).tokens[:1]
    return "\n" if first and first[0][:1] in ("\u2581", "\u0120") else ""


def _token_texts(tokenizer: Tokenizer, size: int) -> list[str]:
    """Text of each token in the middle of others, where decoders strip no space; [V]."""
    anchor = tokenizer.encode("x", add_special_tokens=False).ids[-1]
    skip = len(tokenizer.decode([anchor], skip_special_tokens=False))
    return [tokenizer.decode([anchor, i], skip_special_tokens=False)[skip:] for i in range(size)]


def _mark(encoding: Encoding, skip: int, parts: Sequence[Part]) -> Piece:
    """Kinds of tokens from the kinds of the characters they overlap (the later part wins); tokens
    of the first ``skip`` characters are left out."""
    ends = np.array([end for _, end in encoding.offsets], np.int64)
    first_token = int(np.searchsorted(ends, skip, side="right")) if skip else 0
    ids, ends = np.array(encoding.ids, np.uint32)[first_token:], ends[first_token:]
    kinds = np.full(len(ids), Kind.TEXT, np.uint8)
    start = skip
    for text, kind in parts:
        stop = start + len(text)
        if kind != Kind.TEXT:
            first = int(np.searchsorted(ends, start, side="right"))
            last = int(np.searchsorted(ends, stop, side="left"))
            kinds[first : last + 1] = kind
        start = stop
    return Piece(ids, kinds)
