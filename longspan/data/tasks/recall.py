"""Recall: a few facts in lines of their own, and at once a question about each, in any order.

Nothing stands between facts and questions, so a row of 4,096 tokens has some seventy answers where
one of `needles` has some twenty in a long text. What they are for is learnt here first: to find
a key, and above all to bring along a number that was read before its key. A question is now and
then about a fact further back. Distance: from the fact.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from longspan.data.draft import Answer, Sample
from longspan.data.facts import Fact, Group, draw_group
from longspan.data.questions import ask_one, render
from longspan.data.source import Source
from longspan.data.tokens import Kind, Part, Piece, concat
from longspan.data.vocabulary import Words, digits
from longspan.data.woven import draw_template

MAX_LEN = 4096
"""Tokens; longer ones would repeat themselves."""
FAMILIES = {"woven": 50, "record": 20, "natural": 10, "ruler-loose": 10, "ruler": 10}
"""Shares of blocks; half of all facts have the value first."""
VALUE_FIRST = 0.75
FEWEST, MOST = 3, 16
"""Facts of a block."""
SHORT_VALUES = 0.6
"""Share of the blocks whose numbers have one to four digits: of a long one's answer, only the first
digits tell which number was meant, the others follow from them."""
EARLIER = 0.25
"""Share of the questions that are about any fact so far."""
SHORT = (("{k}: ", "{v}\n"), ("{k} ->", " {v}\n"), ("{k} =", " {v}\n"), ("# {k}\n", "{v}\n"))
"""Questions that are nothing but the key, and their answers."""
_FACT_LEN, _QUESTION_LEN = 20, 16
"""Tokens at the least, about."""


def recall(rng: random.Random, source: Source, room: int) -> Sample | None:
    """Return blocks of facts and questions of at most ``room`` tokens, and `MAX_LEN`."""
    room = min(room, MAX_LEN)
    texts, about = _draw_texts(rng, source, room)
    encoded = source.table.encode(texts)
    pieces: list[Piece] = []
    answers: list[Answer] = []
    starts: list[int] = []
    total = 0
    for piece, fact in zip(encoded, about, strict=True):
        if total + len(piece) > room:
            break
        if fact is None:
            starts.append(total)
        else:
            first = int((piece.kinds == Kind.ANSWER).argmax())
            answers.append(Answer(total + first, total + len(piece), total + first - starts[fact]))
        pieces.append(piece)
        total += len(piece)
    return Sample("recall", concat(pieces), tuple(answers)) if answers else None


def _draw_texts(
    rng: random.Random, source: Source, room: int
) -> tuple[list[Sequence[Part]], list[int | None]]:
    """Draw lines, and of each the number of the fact that it asks about; None: it is a fact."""
    most = room // (_FACT_LEN + _QUESTION_LEN) + MOST
    words = Words.draw(rng, source.corpus.words, most, hard=rng.random() < 0.3)
    used: set[str] = set()
    facts: list[Fact] = []
    texts: list[Sequence[Part]] = []
    about: list[int | None] = []
    while len(facts) + MOST <= most:
        first = len(facts)
        groups = _draw_groups(rng, source)
        has_short = rng.random() < SHORT_VALUES
        facts += [_fact(rng, rng.choice(groups), words, used, has_short)
                  for _ in range(rng.randrange(FEWEST, MOST + 1))]
        texts += [(*fact.parts, ("\n", Kind.TEXT)) for fact in facts[first:]]
        about += [None] * (len(facts) - first)
        is_short = rng.random() < 0.4
        for own in rng.sample(range(first, len(facts)), len(facts) - first):
            asked = rng.randrange(len(facts)) if rng.random() < EARLIER else own
            texts.append(_question(rng, source, facts[asked], is_short))
            about.append(asked)
    return texts, about


def _draw_groups(rng: random.Random, source: Source) -> list[Group]:
    """Draw the wordings of a block: one for all facts, two, or as many as there may be facts."""
    family = rng.choices(list(FAMILIES), list(FAMILIES.values()))[0]
    woven = partial(draw_template, source=source, value_first=VALUE_FIRST)
    return [draw_group(rng, family, source.wordings, woven)
            for _ in range(rng.choice((1, 2, MOST)))]


def _fact(
    rng: random.Random, group: Group, words: Words, used: set[str], is_short: bool
) -> Fact:
    fact = group.make(rng, words, used)
    if is_short and fact.value.isdigit():
        return group.with_key(fact.key, digits(rng, rng.choice((1, 1, 2, 2, 3, 4))))
    return fact


def _question(
    rng: random.Random, source: Source, fact: Fact, is_short: bool
) -> tuple[Part, ...]:
    if is_short and fact.key:
        before, behind = rng.choice(SHORT)
        return ((before.replace("{k}", fact.key), Kind.TEXT),
                (behind.replace("{v}", fact.value), Kind.ANSWER))
    return render(rng, False, ask_one(rng, source, fact))
