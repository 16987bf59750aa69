"""The agent that answers over a whole document (the report's, after Qwen-Agent's document readers).

Three levels, each on the one before. *Retrieval*: the model names words to search for, BM25 finds
parts, the answer comes from them. *Reading*: the model reads the document part by part and copies
what helps; that, and the question, is what BM25 searches with. *Steps*: as long as something is
missing, the model asks a simpler question, which retrieval answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from longspan.data.instruct.asking import Asker
from longspan.data.instruct.checks import is_quoted, is_refusal
from longspan.data.instruct.library import split
from longspan.data.instruct.prompts import ANSWER, KEYWORDS, READ, STEP
from longspan.data.instruct.search import Index
from longspan.data.tokens import TokenTable
from longspan.errors import LongspanError

_NONE = re.compile(r"\W*(none|no sentences?|n/?a)\b", re.IGNORECASE)
_ASK = re.compile(r"^\W*ask\W*:\s*(.+)$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Agent:
    """How a document is read."""

    part_len: int = 512
    """Tokens of a part, at most."""
    evidence_len: int = 4096
    """Tokens of the parts that an answer is written from, at most."""
    max_steps: int = 2
    """Simpler questions, at most; 0: none."""
    reads_all: bool = True
    """Whether every part is read; else only those that retrieval finds."""
    answer_len: int = 512
    """Tokens of an answer, at most."""
    quote_len: int = 160
    """Tokens of what is copied from a part, at most."""

    def __post_init__(self) -> None:
        if self.evidence_len < self.part_len:
            raise LongspanError(f"evidence of {self.evidence_len:,} tokens has no room for a part "
                                f"of {self.part_len:,}: raise --evidence, or lower --part")

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt with its reply, about: notes and wording included."""
        notes = self.max_steps * (self.answer_len // 2)
        return self.evidence_len + notes + 2 * self.answer_len + 256


@dataclass(frozen=True, slots=True)
class Found:
    """An answer and what it comes from."""

    text: str
    is_cut: bool
    evidence: tuple[int, ...]
    """Parts of the document that the model saw, in their order."""
    quotes: tuple[str, ...] = ()
    steps: tuple[tuple[str, str], ...] = ()
    """Simpler questions with their answers."""


@dataclass(slots=True)
class OpenDocument:
    """A document in parts, ready to be searched."""

    ids: np.ndarray
    table: TokenTable
    agent: Agent
    parts: list[tuple[int, int]] = field(init=False)
    """Tokens [start, stop) of each part."""
    texts: list[str] = field(init=False)
    index: Index = field(init=False)

    def __post_init__(self) -> None:
        self.parts = split(self.ids, self.table, self.agent.part_len)
        self.texts = [self.table.text(self.ids[start:stop]) for start, stop in self.parts]
        self.index = Index(self.texts)

    def evidence(self, query: str) -> tuple[int, ...]:
        """Return the best parts that fit, in the document's order."""
        chosen: list[int] = []
        room = self.agent.evidence_len
        for i in self.index.best(query):
            start, stop = self.parts[i]
            if stop - start > room:
                break
            chosen.append(i)
            room -= stop - start
        return tuple(sorted(chosen))

    def show(self, parts: Sequence[int]) -> str:
        """Return parts as a prompt shows them."""
        return "\n\n".join(f"<part {i + 1}>\n{self.texts[i].strip()}\n</part {i + 1}>"
                           for i in parts)


def retrieve(asker: Asker, document: OpenDocument, query: str, notes: str = "") -> Found:
    """Answer from the parts that keywords find."""
    keywords = asker.ask(KEYWORDS, 64, query=query).text.replace("\n", " ")
    return _answer(asker, document, query, document.evidence(f"{query} {keywords}"), notes)


def read(asker: Asker, document: OpenDocument, query: str) -> Found:
    """Answer after reading part by part, then step by step what is still missing."""
    agent = document.agent
    numbers: Sequence[int] = range(len(document.parts))
    if not agent.reads_all:
        numbers = document.evidence(query)
    quotes = [quote for i in numbers for quote in _copy(asker, document, i, query)]
    evidence = document.evidence(" ".join([query, *quotes]))
    steps = _take_steps(asker, document, query, quotes)
    notes = "".join(f"{ask} {answer}\n" for ask, answer in steps)
    found = _answer(asker, document, query, evidence, f"Known besides:\n{notes}\n" if notes else "")
    return Found(found.text, found.is_cut, found.evidence, tuple(quotes), tuple(steps))


def _copy(asker: Asker, document: OpenDocument, number: int, query: str) -> list[str]:
    """Return the sentences of a part that the model copied; what it made up is left out."""
    reply = asker.ask(READ, document.agent.quote_len, number=number + 1, count=len(document.parts),
                      chunk=document.texts[number].strip(), query=query).text
    if _NONE.match(reply):
        return []
    lines = [line.strip(" -*\"'") for line in reply.split("\n")]
    return [line for line in lines if is_quoted(line, document.texts[number])]


def _take_steps(
    asker: Asker, document: OpenDocument, query: str, quotes: Sequence[str]
) -> list[tuple[str, str]]:
    steps: list[tuple[str, str]] = []
    for _ in range(document.agent.max_steps):
        known = [*quotes[:12], *(f"{ask} {answer}" for ask, answer in steps)]
        reply = asker.ask(STEP, 96, query=query, notes="\n".join(known) or "Nothing.").text
        asked = _ASK.search(reply)
        if asked is None or asked[1].strip() in (query, *(ask for ask, _ in steps)):
            break
        answer = retrieve(asker, document, asked[1].strip()).text
        if is_refusal(answer):
            break
        steps.append((asked[1].strip(), answer))
    return steps


def _answer(
    asker: Asker, document: OpenDocument, query: str, evidence: tuple[int, ...], notes: str
) -> Found:
    if not evidence:
        return Found("Not in the document", False, ())
    reply = asker.ask(ANSWER, document.agent.answer_len, evidence=document.show(evidence),
                      notes=notes, query=query)
    return Found(reply.text.removeprefix("Answer:").strip(), reply.is_cut, evidence)
