"""Asking a model, each thing once: replies are kept, so that a run that was cut repeats none."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from longspan.data.instruct.prompts import Prompt
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
    """All replies of a run, on disk; a context's `Asker` takes from them what it asks again."""

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


@dataclass(slots=True)
class Asker:
    """Asks in the name of one job and remembers the steps."""

    calls: Calls
    job: str
    seed: int
    steps: list[dict[str, str]] = field(default_factory=list)
    """Prompt with its version, and the call's name, of each step in order."""

    def ask(
        self, prompt: Prompt, max_tokens: int, temperature: float = 0.0, /, **values: object
    ) -> Reply:
        """Return the reply to a prompt with its values filled in."""
        messages = [{"role": "user", "content": prompt.fill(values)}]
        name, reply = self.calls.reply(self.job, messages, max_tokens, temperature, self.seed)
        self.steps.append({"prompt": prompt.label, "call": name})
        return Reply(reply.text.strip(), reply.is_cut)
