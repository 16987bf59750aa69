"""What a query and an answer must be: rules first, the model's own verdict where rules cannot tell.

Each verdict has a number beside it, so that thresholds can be judged afterwards.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from longspan.documents.words import words

MIN_QUERY_WORDS, MAX_QUERY_WORDS = 4, 90
MIN_ANSWER_CHARS = 2
SAME_QUERY = 0.8
"""Share of common words from which on two queries are one."""
AGREE, DISAGREE = 0.6, 0.2
"""Shares of common words between which the model is asked whether answers say the same."""
GROUNDED = 0.5
"""Least share of an answer's words that its evidence has."""
QUOTED = 0.7
"""Least share of a copied sentence's words that stand in its part."""
MAX_REPEATED = 0.5
"""Largest share of an answer's lines or word runs that repeat earlier ones."""
_REFUSAL = re.compile(
    r"^\W*(unknown|none|n/?a|not (in|mentioned|stated|given|specified|provided)|no answer)\b"
    r"|\b(i('m| am) (sorry|unable)|i (cannot|can't|do not|don't)|as an ai)\b"
    r"|\b(documents?|texts?|parts?|passages?|information)\b[^.]{0,40}"
    r"\b(does not|doesn't|do not|don't|did not) "
    r"(say|state|mention|specify|provide|contain|include)",
    re.IGNORECASE)
_POINTING = re.compile(
    r"\b(this|the|that|given|provided|above|following) (part|passage|segment|excerpt|section|text|"
    r"snippet|paragraph)\b|\b(described|mentioned|shown|given|provided) (above|here)\b",
    re.IGNORECASE)
_REQUEST = re.compile(
    r"(please )?(analy[sz]e|compare|complete|describe|discuss|explain|find|give|list|name|outline|"
    r"provide|rewrite|show|state|sum|summari[sz]e|tell|translate|write)\b", re.IGNORECASE)
_STOP = frozenset(words(
    "a an the of in on at to for from by with and or but as is are was were be been it its this "
    "that these those he she they them his her their which who what when where why how does do did "
    "has have had not no can could will would should may might than then so if into about also"))
_NUMBER = re.compile(r"\d[\d.,]*\d|\d")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a filter found."""

    name: str
    passed: bool
    value: float | str = ""

    def as_json(self) -> dict[str, object]:
        """Return it as a sample has it."""
        return {"filter": self.name, "passed": self.passed, "value": self.value}


def check_query(query: str, was_cut: bool) -> Verdict:
    """Whether there is one question of a sensible length that names what it is about."""
    count = len(words(query))
    if was_cut:
        return Verdict("form", False, "cut short")
    if not MIN_QUERY_WORDS <= count <= MAX_QUERY_WORDS:
        return Verdict("form", False, f"{count} words")
    if query.isascii() and "?" not in query and not _REQUEST.match(query):
        return Verdict("form", False, "neither question nor request")
    pointing = _POINTING.search(query)
    return Verdict("form", pointing is None, pointing[0] if pointing else "")


def check_length(answer: str, is_cut: bool) -> Verdict:
    """Whether an answer is whole, has a length, and does not go round in circles."""
    if is_cut:
        return Verdict("length", False, "cut short")
    if len(answer) < MIN_ANSWER_CHARS:
        return Verdict("length", False, f"{len(answer)} characters")
    share = repeated_share(answer)
    return Verdict("length", share <= MAX_REPEATED, round(share, 3))


def check_refusal(answer: str) -> Verdict:
    """Whether there is an answer at all."""
    return Verdict("refusal", not is_refusal(answer))


def check_grounded(answer: str, query: str, evidence: str) -> Verdict:
    """Whether the evidence has the answer's words, and each number that the query does not have."""
    known = set(words(evidence))
    numbers = set(_numbers(answer)) - set(_numbers(query))
    strange = sorted(numbers - set(_numbers(evidence)))
    if strange:
        return Verdict("grounded", False, f"number {strange[0]}")
    found = _content(answer) - _content(query) or _content(answer)
    share = len(found & known) / max(1, len(found))
    return Verdict("grounded", share >= GROUNDED, round(share, 3))


def agreement(first: str, second: str) -> float:
    """Share of the shorter answer's words that the longer one has; 0 where both name numbers and
    share none."""
    if is_refusal(first) or is_refusal(second):
        return 0.0
    numbers = set(_numbers(first)), set(_numbers(second))
    if all(numbers) and not numbers[0] & numbers[1]:
        return 0.0
    contents = sorted((_content(first), _content(second)), key=len)
    return len(contents[0] & contents[1]) / max(1, len(contents[0]))


def is_refusal(answer: str) -> bool:
    """Whether an answer says that there is none."""
    return not answer.strip() or _REFUSAL.search(answer[:300]) is not None


def is_quoted(sentence: str, part: str) -> bool:
    """Whether a sentence was copied, not made up."""
    found = words(sentence)
    known = set(words(part))
    return len(found) >= 2 and sum(word in known for word in found) >= QUOTED * len(found)


def repeated_share(text: str) -> float:
    """Share of runs of four words that stood there before."""
    found = words(text)
    runs = Counter(tuple(found[i : i + 4]) for i in range(len(found) - 3))
    total = sum(runs.values())
    return 1 - len(runs) / total if total else 0.0


def similarity(first: str, second: str) -> float:
    """Share of the words with a content that two queries have in common (Jaccard)."""
    one, two = _content(first), _content(second)
    return len(one & two) / max(1, len(one | two))


def _content(text: str) -> set[str]:
    found = words(text)
    return set(found) - _STOP or set(found)


def _numbers(text: str) -> list[str]:
    return [number.replace(",", "").rstrip(".") for number in _NUMBER.findall(text)]
