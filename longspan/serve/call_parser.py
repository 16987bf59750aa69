"""Tool calls in an answer's text, found while it is written: names as soon as they are whole,
arguments piece by piece. Text that only looked like a call is given out as text."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from longspan.engine.text.call_format import CallFormat

MAX_HEAD = 512
"""Characters within which a call names its function where no mark says that it is one."""
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(arguments|parameters)"\s*:\s*'
                  r'(?=\S)')
NO_ARGUMENTS = "{}"


@dataclass(frozen=True, slots=True)
class Said:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A call begins."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Argued:
    """More of a call's arguments, JSON text."""

    index: int
    text: str


Piece = Said | Called | Argued


class CallParser:
    """Reads one answer. What it returns never has to be taken back.

    Small models forget the marks now and then: an answer that begins with a brace and calls one of
    the tools is a call in every format.

    Args:
        format: how the model writes calls.
        names: of the tools.
    """

    def __init__(self, format: CallFormat, names: Collection[str]) -> None:
        self._format, self._names = format, frozenset(names)
        self._is_bare = not format.begin
        """Calls have no marks."""
        self._text = ""
        """What is not decided yet."""
        self._gap = ""
        """White space before the call, which is part of the answer if it is none."""
        self._num_calls = 0
        self._has_said = False
        self._value: _Value | None = None
        """Arguments that are being written."""
        self._is_inside = False
        """Behind the beginning of a call."""
        self._is_behind = False
        """Behind the arguments of a call, before its end."""

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._num_calls

    def push(self, text: str, *, is_last: bool = False) -> list[Piece]:
        """Add text; returns what it makes certain, everything if no more comes."""
        self._text += text
        pieces = list[Piece]()
        while (found := self._step(is_last)) is not None:
            pieces += found
        if is_last and self._is_inside and not self._is_bare:  # it ends right behind the mark
            pieces += self._say(self._gap + self._format.begin)
        return pieces

    def _step(self, is_last: bool) -> list[Piece] | None:
        """Go on by one part of the text; None where nothing is certain."""
        if not self._text:
            return None
        if self._value is not None:
            return self._argue(self._value)
        if self._is_behind:
            return self._leave(is_last)
        if self._is_inside:
            return self._open(is_last)
        return self._look(is_last)

    # -- outside of calls ----------------------------------------------------------------------

    def _look(self, is_last: bool) -> list[Piece] | None:
        """Look for the beginning of a call. White space before it is no part of the answer."""
        begin = self._format.begin
        if self._is_bare:
            return self._look_for_brace(is_last)
        if not (self._has_said or self._num_calls) and self._text.lstrip().startswith("{"):
            self._is_bare = True
            return []
        place = self._text.find(begin)
        if place >= 0:
            before, self._text = self._text[:place], self._text[place + len(begin):]
            said, self._is_inside = before.rstrip(), True
            self._gap = before[len(said):]
            return self._say(said)
        keep = 0 if is_last else _overlap(self._text, begin)
        rest = self._text[:len(self._text) - keep]
        if not is_last or self._num_calls:
            rest = rest.rstrip()
        if not rest:
            return self._drop() if is_last else None
        self._text = "" if is_last else self._text[len(rest):]
        return self._say(rest)

    def _look_for_brace(self, is_last: bool) -> list[Piece] | None:
        start = self._text.lstrip().lstrip(";" if self._num_calls else "").lstrip()
        if not start and not is_last:
            return None
        if start.startswith("{") and not self._has_said:
            self._text, self._is_inside = start, True
            return []
        said, self._text = self._text, ""
        return self._say(said) if start or not self._num_calls else []

    def _say(self, text: str) -> list[Piece]:
        self._has_said |= bool(text)
        return [Said(text)] if text else []

    def _drop(self) -> list[Piece]:
        self._text = ""
        return []

    # -- inside --------------------------------------------------------------------------------

    def _open(self, is_last: bool) -> list[Piece] | None:
        """Read a call up to its arguments; or all of it, where it is written in another order."""
        head = HEAD.match(self._text)
        if head is not None and (not self._is_bare or head[1] in self._names):
            self._text = self._text[head.end():]
            self._value, self._is_inside = _Value(), False
            return [self._call(head[1])]
        mark = "" if self._is_bare else self._format.end
        end = self._text.find(mark) if mark else -1
        is_hopeless = self._is_bare and (head is not None or len(self._text) > MAX_HEAD)
        if not (is_last or end >= 0 or is_hopeless):
            return None
        whole = self._text if end < 0 else self._text[:end]
        self._text = "" if end < 0 else self._text[end + len(mark):]
        self._is_inside = False
        return self._take_whole(whole, mark if end >= 0 else "")

    def _take_whole(self, text: str, end: str) -> list[Piece]:
        try:
            call: Any = json.loads(text)
            name, arguments = call["name"], call.get("arguments", call.get("parameters"))
            assert isinstance(name, str) and (not self._is_bare or name in self._names)
        except (ValueError, RecursionError, TypeError, LookupError, AttributeError, AssertionError):
            if self._is_bare:
                self._is_bare = not self._format.begin
                return self._say(text)
            return self._say(self._gap + self._format.begin + text + end)
        written = arguments if isinstance(arguments, str) else json.dumps(
            arguments or {}, ensure_ascii=False)
        return [piece := self._call(name), Argued(piece.index, written)]

    def _call(self, name: str) -> Called:
        self._num_calls += 1
        return Called(self._num_calls - 1, name)

    def _argue(self, value: _Value) -> list[Piece]:
        """Read more of the arguments."""
        found, self._text = value.read(self._text)
        if value.is_whole:
            self._value, self._is_behind = None, True
        index = self._num_calls - 1
        return [Argued(index, text) for text in found if text]

    def _leave(self, is_last: bool) -> list[Piece] | None:
        """Read on to the end of the call."""
        end = "}" if self._is_bare else self._format.end
        place = self._text.find(end)
        if place < 0:
            self._text = "" if is_last else self._text[-len(end):]
            return None
        self._text, self._is_behind = self._text[place + len(end):], False
        return []


class _Value:
    """A JSON value that is being written: an object is given out as it comes, a string that holds
    one without its quotes, anything else as no arguments."""

    def __init__(self) -> None:
        self.is_whole = False
        self._kind = ""
        self._held = ""
        self._depth = 0
        self._in_string = self._is_escaped = False

    def read(self, text: str) -> tuple[list[str], str]:
        """Take text; returns pieces of arguments, and the text behind the value."""
        self._kind = self._kind or text[0]
        if self._kind == "{":
            end = self._end(text)
            return [text[:end]], text[end:]
        self._held += text
        if self._kind == '"':
            return self._read_string()
        for place, char in enumerate(self._held):
            if char in ",}":
                self.is_whole = True
                return [NO_ARGUMENTS], self._held[place:]
        return [], ""

    def _read_string(self) -> tuple[list[str], str]:
        try:
            value, end = json.JSONDecoder().raw_decode(self._held)
        except ValueError:
            return [], ""
        self.is_whole = True
        return [value], self._held[end:]

    def _end(self, text: str) -> int:
        """Return where the object ends in this text, its length if it does not."""
        for place, char in enumerate(text):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                else:
                    self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    self.is_whole = True
                    return place + 1
        return len(text)


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of the text that begins the mark."""
    return next((length for length in range(min(len(text), len(mark) - 1), 0, -1)
                 if mark.startswith(text[-length:])), 0)
