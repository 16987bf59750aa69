"""Prompts of an exact length, put together from pieces around the facts that they hide."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from longspan.errors import LongspanError
from longspan.eval.text import MIN_PIECE_CHARS, Encoder, Piece, TextBank, TextTokenizer

MIN_ENDING_TOKENS = 16
MIN_FILLER_TOKENS = 256
"""Fewer tokens of real text than this are no haystack."""
MIN_LINES = 4
"""Fewer lines than this are none either."""
ENDINGS = ("", ".", " a", " a.", " a b", " a b c")
MAX_ENDING_TRIES = 64
PREFIX_PLACES = ("assistant", "user", "none")


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the message of a prompt, and where the beginning of the answer goes."""

    before: str
    after: str
    prefix_in: str = "assistant"
    """``assistant``: behind the frame, as RULER does it; ``user``: at the end of the message, for
    servers that take messages only; ``none``: left out."""

    @classmethod
    def chat(cls, tokenizer: TextTokenizer, prefix_in: str = "assistant") -> Frame:
        """Make the frame that the tokenizer's chat template puts around a user's message.

        The first part ends in a line end (or is empty), so that a document's tokens do not depend
        on it. Raises `LongspanError` for a template that leaves the message out.
        """
        mark = "CONTENT-OF-THE-MESSAGE"
        prompt = tokenizer.render_chat([{"role": "user", "content": mark}])
        before, found, after = prompt.partition(mark)
        if not found:
            raise LongspanError("the chat template leaves the user's message out")
        return cls(before if not before or before.endswith("\n") else before + "\n", after,
                   prefix_in)

    def tail(self, question: str, prefix: str = "") -> str:
        """Return the end of a prompt: question, end of the message, beginning of the answer."""
        if self.prefix_in == "user":
            return question + prefix + self.after
        return question + self.after + (prefix if self.prefix_in == "assistant" else "")


PLAIN = Frame("", "")
"""For models without a chat template: the answer goes on where the question ends."""


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What tasks build their prompts of."""

    encoder: Encoder
    bank: TextBank
    frame: Frame
    words: tuple[str, ...] = ()
    """For lists of words, instead of the ones built in."""
    data: Path | None = None
    """Folder of the files of LV-Eval, LongBench and the question sets."""
    max_prompt_tokens: int | None = None
    """For tasks whose lengths are those of their data."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as tokens and as text."""

    pieces: Sequence[Piece] = field(repr=False)
    frame: Frame

    @cached_property
    def ids(self) -> array[int]:
        """Token ids."""
        return array("i", np.concatenate([piece.ids for piece in self.pieces]).tobytes())

    @property
    def text(self) -> str:
        """The whole text, without a beginning-of-text token."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def message(self) -> str:
        """The user's message alone, for servers that put the frame around it themselves."""
        assert self.frame.prefix_in != "assistant" or not self.frame.after
        return self.text.removeprefix(self.frame.before).removesuffix(self.frame.after)

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the ids."""
        return hashlib.sha256(self.ids.tobytes()).hexdigest()[:16]

    def check(self, encoder: Encoder) -> None:
        """Raise `LongspanError` if the ids are not those of the text."""
        ids = [token for piece in self.pieces if piece.text for token in piece.ids]
        if not np.array_equal(ids, encoder.piece(self.text).ids):
            raise LongspanError(
                "this tokenizer joins what the prompts are put together from: the tokens of a "
                f"prompt of {len(self.ids)} tokens are not those of its text")


def open_prompt(materials: Materials, head: str) -> list[Piece]:
    """Return the first pieces of a prompt: beginning-of-text token if the frame is plain, and
    head."""
    before = materials.frame.before
    start = [] if before else [piece for piece in [materials.encoder.opening()] if len(piece.ids)]
    return start + ([materials.encoder.piece(before + head)] if before + head else [])


def count_tokens(pieces: Sequence[Piece]) -> int:
    """Count the tokens of pieces together."""
    return sum(len(piece.ids) for piece in pieces)


@dataclass(frozen=True, slots=True)
class Haystack:
    """The beginning of prompts that end differently: everything before the ending."""

    pieces: list[Piece]
    num_tokens: int
    positions: list[int]
    """Tokens before each fact, in the order of the facts."""
    next_text: str
    """What the document would go on with."""

    def finish(self, materials: Materials, tail: str, num_tokens: int) -> Prompt:
        """Finish the prompt of exactly `num_tokens` tokens that ends in `tail`, behind some more
        text."""
        return self.close(materials, self.end_with_text(materials, tail, num_tokens) + tail)

    def end_with_text(self, materials: Materials, tail: str, num_tokens: int) -> str:
        """Return the text that a prompt of exactly `num_tokens` tokens needs before `tail`."""
        return fit_ending(materials.encoder, self.next_text, tail, num_tokens - self.num_tokens)

    def close(self, materials: Materials, tail: str) -> Prompt:
        """Return the prompt that ends in `tail`."""
        return Prompt([*self.pieces, materials.encoder.piece(tail)], materials.frame)


def bury_in_prose(
    materials: Materials, *, head: str, facts: Sequence[tuple[float, str]], num_tail_tokens: int,
    num_tokens: int, rng: random.Random,
) -> Haystack:
    """Bury facts in a document of real text, a line each, at depths from 0 to 1.

    Room is left for a tail of `num_tail_tokens` and an ending before it. Raises `LongspanError`
    when the facts do not fit into `num_tokens`.
    """
    start = open_prompt(materials, head)
    lines = [materials.encoder.piece(text) for _, text in facts]
    fixed = count_tokens(start) + count_tokens(lines) + num_tail_tokens + MIN_ENDING_TOKENS
    room = num_tokens - fixed
    if room < MIN_FILLER_TOKENS:
        raise TooShortError(num_tokens, fixed + MIN_FILLER_TOKENS, f"{len(facts)} facts")
    document = materials.bank.take(rng, room)
    borders = np.cumsum([0, *(len(piece.ids) for piece in document)])
    stop = int(np.searchsorted(borders, room, "right")) - 1
    depths = [depth for depth, _ in facts]
    body, positions = insert_at(document[:stop], list(zip(depths, lines, strict=True)))
    offset = count_tokens(start)
    next_text = document[min(stop, len(document) - 1)].text
    return Haystack(start + body, offset + count_tokens(body),
                    [offset + position for position in positions], next_text)


def bury_in_lines(
    materials: Materials, *, head: str, facts: Sequence[str], next_line: Callable[[], Piece],
    num_tail_tokens: int, num_tokens: int, rng: random.Random,
) -> Haystack:
    """Bury facts in as many whole lines as fit, before randomly chosen ones, in their order.

    Raises `LongspanError` when not even `MIN_LINES` and one for each fact fit.
    """
    start = open_prompt(materials, head)
    needles = [materials.encoder.piece(text) for text in facts]
    fixed = count_tokens(start) + count_tokens(needles) + num_tail_tokens
    lines: list[Piece] = []
    used = fixed
    while used + len((line := next_line()).ids) <= num_tokens:
        lines.append(line)
        used += len(line.ids)
    least = max(MIN_LINES, len(facts))
    if len(lines) < least:
        raise TooShortError(num_tokens, fixed + least * len(line.ids), f"{len(facts)} facts")
    body: list[Piece] = []
    positions = []
    done = 0
    for place, needle in zip(sorted(rng.sample(range(len(lines)), len(facts))), needles,
                             strict=True):
        body += lines[done:place]
        positions.append(count_tokens(start) + count_tokens(body))
        body.append(needle)
        done = place
    return Haystack([*start, *body, *lines[done:]], used - num_tail_tokens, positions, "")


def insert_at(
    document: Sequence[Piece], items: Sequence[tuple[float, Piece]]
) -> tuple[list[Piece], list[int]]:
    """Insert each item into the document at the border nearest to its depth.

    Returns the pieces and the tokens before each item, in the order of `items`.
    """
    borders = np.cumsum([0, *(len(piece.ids) for piece in document)])
    places = [int(np.abs(borders - depth * borders[-1]).argmin()) for depth, _ in items]
    pieces: list[Piece] = []
    found = [0] * len(items)
    done = added = 0
    for index in sorted(range(len(items)), key=places.__getitem__):
        pieces += document[done:places[index]]
        done = places[index]
        found[index] = int(borders[done]) + added
        added += len(items[index][1].ids)
        pieces.append(items[index][1])
    return [*pieces, *document[done:]], found


def fit_ending(encoder: Encoder, text: str, tail: str, num_tokens: int) -> str:
    """Cut the beginning of `text` to one line, such that it and `tail` are `num_tokens`
    together."""
    line = " ".join([*text.split(), *["and so on"] * MIN_PIECE_CHARS])

    def length(ending: str) -> int:
        return encoder.count(ending + tail)

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


class TooShortError(LongspanError):
    """A prompt has no room for what it must hold."""

    def __init__(self, num_tokens: int, least: int, what: str) -> None:
        self.missing = least - num_tokens
        self.what = what
        super().__init__(f"a prompt of {num_tokens} tokens is too short for {what}; at least "
                         f"{least} tokens are needed")
