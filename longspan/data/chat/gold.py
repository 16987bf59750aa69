"""What is right: the values that answer a question, how a reply says them, what else there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.data.facts import join_list

NAME, NUMBER, COUNT, UUID, WORD = "name", "number", "count", "uuid", "word"
"""Kinds of values: any names, digits, small numbers, UUIDs, two words with a hyphen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gold:
    """The right answer to one question."""

    items: tuple[str, ...]
    """Values, in the order of a full answer; none: the text does not say."""
    others: tuple[str, ...] = ()
    """Values that the text has for other keys."""
    keys: tuple[str, ...] = ()
    """What the question names; a reply may repeat it."""
    kind: str = NUMBER
    is_ordered: bool = False
    """Whether an answer in another order is wrong."""
    frame: str = "{}"
    """The sentence around the values."""
    by_space: bool = False
    """Values stand with spaces between, without commas."""
    is_numbered: bool = False
    """Each value has its number before it."""
    refusal: str
    """The sentence that says that the text does not."""

    def reply(self, items: Sequence[str]) -> str:
        """Return a reply with these values; a refusal for none."""
        if not items:
            return self.refusal
        if self.is_numbered:
            items = [f"{number}. {item}" for number, item in enumerate(items, 1)]
        values = " ".join(items) if self.by_space else join_list(list(items))
        return self.frame.replace("{}", values)

    @property
    def right(self) -> str:
        """The full and right reply."""
        return self.reply(self.items)


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and what answers it."""

    question: str
    gold: Gold


@dataclass(frozen=True, slots=True)
class Exercise:
    """A document and questions about it, in their order."""

    task: str
    document: str
    turns: tuple[Turn, ...]
    joint: str = "\n\n"
    """What stands between the document and the first question."""

    def messages(self, last_reply: bool = True) -> list[dict[str, str]]:
        """Return the conversation with all right replies, or up to the last question."""
        found = []
        for number, turn in enumerate(self.turns):
            text = turn.question
            if not number:
                text = self.document.rstrip() + self.joint + text
            found += [{"role": "user", "content": text},
                      {"role": "assistant", "content": turn.gold.right}]
        return found if last_reply else found[:-1]
