"""Asking a model, each thing once: replies are kept, so that a run that was cut repeats none."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from longspan.data.lines import Lines, dump
from longspan.errors import LongspanError

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said."""

    text: str
    is_cut: bool = False
    """It reached its longest length."""


class Say(Protocol):
    """A model: behind an address, or in this process. Called from several threads."""

    def __call__(
        self, messages: Messages, max_tokens: int, temperature: float, seed: int
    ) -> Reply:
        """Return the reply. Raises `UnansweredError` when there is none for now."""


class UnansweredError(LongspanError):
    """The model did not answer; the next run asks again."""


class StoppedError(Exception):
    """The run ends; nothing more is asked."""


class Calls:
    """All replies of a run, on disk; what is asked again is taken from them."""

    def __init__(self, say: Say, lines: Lines, known: Iterable[Mapping[str, Any]]) -> None:
        self._say, self._lines = say, lines
        self._known = {(row["job"], row["call"]): Reply(row["text"], row["is_cut"])
                       for row in known}
        self._stop = threading.Event()

    def stop(self) -> None:
        """Let no thread ask anything more."""
        self._stop.set()

    def reply(
        self, job: str, messages: Messages, max_tokens: int, temperature: float, seed: int
    ) -> tuple[str, Reply]:
        """Return a call's name and the reply, which is kept before anybody sees it."""
        content = json.dumps([list(messages), max_tokens, temperature, seed])
        name = hashlib.sha256(content.encode()).hexdigest()[:16]
        found = self._known.get((job, name))
        if found is None:
            if self._stop.is_set():
                raise StoppedError
            found = self._say(messages, max_tokens, temperature, seed)
            self._lines.append(dump({"job": job, "call": name, "text": found.text,
                                     "is_cut": found.is_cut}))
        return name, found
