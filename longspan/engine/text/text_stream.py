"""Completion text as it becomes certain: characters split over tokens, stop strings. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from longspan.engine.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_WINDOW = 24
"""Tokens from which a window that has no character border is cut."""
NUM_KEPT = 8
"""Tokens that are left of it: two characters' worth of single bytes."""
FIRST_MARK, NUM_MARKS = 0x10FF00, 0xF0
"""Characters of the last private plane; stand for special tokens in stop strings."""


class TextStream:
    """Completion text as it becomes certain.

    A character split over tokens is held back until it is whole, and text that may be the start of
    a stop string until it is decided; neither ever has to be taken back. A stop string may name
    special tokens, which are no part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._marks = _marks(tokenizer.special_tokens, stop)
        named = {text: mark for mark, text in zip(
            self._marks.values(), map(tokenizer.special_tokens.__getitem__, self._marks),
            strict=True)}
        self._matcher = StopMatcher([*stop, *_with_marks(stop, named)])

    @property
    def is_stopped(self) -> bool:
        """A stop string was found; further tokens are ignored."""
        return self._matcher.is_stopped

    @property
    def num_held(self) -> int:
        """Characters held back because a stop string may begin there."""
        return self._matcher.num_held

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that it makes certain."""
        text = self._detokenizer.push(token_id)
        return self._shown(self._matcher.push(text + self._marks.get(token_id, "")))

    def flush(self) -> str:
        """Return the text still held back, when the completion ends here."""
        rest = self._matcher.push(self._detokenizer.flush())
        return self._shown(rest + self._matcher.flush())

    def _shown(self, text: str) -> str:
        for mark in self._marks.values():
            text = text.replace(mark, "")
        return text


def _marks(special_tokens: Mapping[int, str], stop: Sequence[str]) -> dict[int, str]:
    """Return a character that no text has for each special token that a stop string names."""
    named = [index for index, text in special_tokens.items()
             if text and any(text in each for each in stop)]
    return {index: chr(FIRST_MARK + place) for place, index in enumerate(named[:NUM_MARKS])}


def _with_marks(stop: Sequence[str], marks: Mapping[str, str]) -> list[str]:
    """Return the stop strings that name special tokens, with these as marks: the longest first, as
    the tokenizer finds them."""
    if not marks:
        return []
    names = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
    written = [names.sub(lambda found: marks[found.group()], each) for each in stop]
    return [new for new, old in zip(written, stop, strict=True) if new != old]


class Detokenizer:
    """Incremental decoding in constant time per token, whatever the tokens are.

    Decodes a window of recent tokens. An incomplete character decodes to one trailing U+FFFD,
    which is held back; more of them before it are invalid bytes for good. Tokens that are no part
    of the text never enter the window, and where it is full only its last tokens stay: a character
    has four bytes at most, so older ones have no part in what is held back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_tokens
        self._window: list[int] = []
        self._num_old = 0
        """Leading tokens of the window that are there for context only."""
        self._num_sent = 0
        """Characters of the window's text already returned."""

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is certain now."""
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        stable_len = len(text) - text.endswith(REPLACEMENT)
        delta = text[self._num_sent:stable_len]
        self._num_sent = max(self._num_sent, stable_len)
        if stable_len == len(text):
            self._shift()
        elif len(self._window) >= MAX_WINDOW:
            self._cut(len(text) - self._num_sent)
        return delta

    def flush(self) -> str:
        """Return the incomplete rest, as U+FFFD."""
        return self._tokenizer.decode(self._window)[self._num_sent:]

    def _shift(self) -> None:
        """Forget the old tokens at a character border; keep the new ones as context."""
        self._window = self._window[self._num_old:]
        self._num_old = len(self._window)
        self._num_sent = len(self._tokenizer.decode(self._window))

    def _cut(self, num_held: int) -> None:
        """Forget all but the last tokens amid a run of invalid bytes."""
        self._window = self._window[-NUM_KEPT:]
        self._num_old = 0
        self._num_sent = max(0, len(self._tokenizer.decode(self._window)) - num_held)


class StopMatcher:
    """Cuts text at the first stop string; holds back what may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.is_stopped = False

    @property
    def num_held(self) -> int:
        """Characters held back."""
        return len(self._held)

    def push(self, text: str) -> str:
        """Add text; returns what certainly is in front of any stop string."""
        if self.is_stopped:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        found = [place for place in map(text.find, self._stop) if place >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        keep = self._num_undecided(text)
        self._held = text[len(text) - keep:]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the text held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of the text that starts a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
