"""What a retrieval row shall hold: facts with their depths, and questions about them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from longspan.data.facts import Fact, Group, draw_group, plain_passkey
from longspan.data.haystack import draw_haystack
from longspan.data.questions import (
    INTRO,
    Ask,
    ask_absent,
    ask_list,
    ask_one,
    ask_values,
    render,
)
from longspan.data.source import Source
from longspan.data.tokens import Part
from longspan.data.vocabulary import Words
from longspan.data.woven import draw_template

NEEDLE_LEN = 34
"""Tokens of a needle, about, where a document is nothing but needles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Focus:
    """What a row asks for: shares of its questions; the rest is about single facts."""

    lists: float = 0.04
    """Several keys in one question (multi-query)."""
    values: float = 0.04
    """All values of a key (multi-value)."""
    absent: float = 0.04
    """Keys that the text does not hold."""
    family: str | None = None
    haystack: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A question about planted facts: text before the answer, the answer, text after it."""

    parts: tuple[Part, ...]
    after: int
    """Index of the fact it must follow; -1: it stands behind the whole document."""
    distance: float
    """Distance to that fact as a share of the log range, in [0, 1)."""
    facts: tuple[int, ...]
    """Indices of the facts that answer it; none: the text does not."""


@dataclass(slots=True)
class RowPlan:
    """A row before it is laid out."""

    is_chat: bool
    haystack: str
    head: str
    facts: list[Fact] = field(default_factory=list)
    depths: list[float] = field(default_factory=list)
    """Per fact, ascending, in [0, 1)."""
    questions: list[Question] = field(default_factory=list)

    def ask(self, rng: random.Random, ask: Ask, facts: Sequence[int], at_end: bool = True) -> None:
        """Add a question that the facts with these indices answer."""
        after = -1 if at_end or not facts else max(facts)
        parts = render(rng, self.is_chat, ask)
        self.questions.append(Question(parts, after, rng.random(), tuple(facts)))


def num_questions(length: int) -> int:
    """Typical number of questions in a row: 24 at 4,096 tokens, 543 at 262,144."""
    return max(2, round(24 * (length / 4096) ** 0.75))


def draw_plan(
    rng: random.Random, source: Source, wanted: int, length: int, focus: Focus | None = None
) -> RowPlan:
    """Facts with depths and about ``wanted`` questions for a row of ``length`` tokens."""
    focus = focus or Focus()
    is_chat = source.table.has_chat and rng.random() < 0.65
    haystack = focus.haystack or draw_haystack(rng)
    plan = RowPlan(is_chat, haystack, "")
    # A key with several values takes several facts.
    count = max(1, round(wanted * rng.uniform(0.8, 1.3) * (1 + 2 * focus.values)))
    if haystack == "needles":
        count = max(wanted, length // NEEDLE_LEN)
    words = Words.draw(rng, source.corpus.words, count, hard=rng.random() < 0.4)
    groups = _draw_groups(rng, source, haystack, focus)
    drawn = [rng.choice(groups) for _ in range(count)]
    used: set[str] = set()
    plan.facts = [group.make(rng, words, used) for group in drawn]
    if haystack != "needles" and focus.family is None and rng.random() < 0.15:
        plan.facts[0] = plain_passkey(rng)
    plan.depths = sorted(rng.random() for _ in plan.facts)
    plan.head = _draw_head(rng, plan.facts[0])
    shares = [_some(rng, share * wanted) for share in (focus.values, focus.lists, focus.absent)]
    free = _ask_values(rng, source, plan, drawn, shares[0])
    _ask_lists(rng, source, plan, drawn, free, shares[1])
    for _ in range(shares[2]):
        fact = rng.choice(groups).make(rng, words, used)
        plan.ask(rng, ask_absent(rng, source, fact), ())
    alone = sorted(free | {i for i, fact in enumerate(plan.facts) if not fact.key})
    for i in rng.sample(alone, max(0, min(wanted - sum(shares), len(alone)))):
        plan.ask(rng, ask_one(rng, source, plan.facts[i]), (i,), at_end=rng.random() < 0.5)
    if not plan.questions:
        plan.ask(rng, ask_one(rng, source, plan.facts[0]), (0,))
    return plan


def _some(rng: random.Random, expected: float) -> int:
    """Return a whole number with this mean."""
    return int(expected) + (rng.random() < expected % 1)


def _draw_groups(
    rng: random.Random, source: Source, haystack: str, focus: Focus
) -> list[Group]:
    if haystack == "needles":
        family = focus.family or rng.choice(("ruler", "ruler", "ruler", "record"))
        return [draw_group(rng, family, source.wordings)]
    # Lists need several facts of one kind.
    most = (1, 1, 2) if focus.values + focus.lists > 0.5 else (1, 1, 2, 3, 4, 6)
    return [draw_group(rng, focus.family, source.wordings, partial(draw_template, source=source))
            for _ in range(rng.choice(most))]


def _draw_head(rng: random.Random, fact: Fact) -> str:
    if rng.random() > 0.3:
        return ""
    end = rng.choice(("\n", "\n", "\n\n"))
    return rng.choice(INTRO).replace("{n}", fact.noun) + end


def _ask_values(
    rng: random.Random, source: Source, plan: RowPlan, drawn: Sequence[Group], count: int
) -> set[int]:
    """Give facts of one group one key, 2 to 4 times ``count``; returns the facts left alone."""
    free = {i for i, fact in enumerate(plan.facts) if fact.key}
    for _ in range(count):
        group = drawn[rng.choice(sorted(free))] if free else None
        pool = [i for i in sorted(free) if drawn[i] is group]
        if group is None or len(pool) < 4:
            continue
        chosen = sorted(rng.sample(pool, min(len(pool) - 1, rng.choice((2, 3, 4)))))
        for i in chosen[1:]:
            plan.facts[i] = group.with_key(plan.facts[chosen[0]].key, plan.facts[i].value)
        free -= set(chosen)
        facts = [plan.facts[i] for i in chosen]
        plan.ask(rng, ask_values(rng, source, facts), chosen)
    return free


def _ask_lists(
    rng: random.Random, source: Source, plan: RowPlan, drawn: Sequence[Group], free: set[int],
    count: int,
) -> None:
    """Ask for 2 to 4 facts of one group at once, ``count`` times."""
    sizes = Counter(id(drawn[i]) for i in free)
    pool = [i for i in sorted(free) if sizes[id(drawn[i])] >= 2]
    for _ in range(count if pool else 0):
        group = drawn[rng.choice(pool)]
        same = [i for i in pool if drawn[i] is group]
        chosen = rng.sample(same, min(len(same), rng.choice((2, 3, 4))))
        plan.ask(rng, ask_list(rng, source, [plan.facts[i] for i in chosen]), chosen)
