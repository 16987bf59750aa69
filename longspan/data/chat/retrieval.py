"""Exercises about planted facts: single ones, records, lists, several values, absent keys, order.

Each is ``f(rng, source, num_tokens, num_turns) -> Exercise | None``: a conversation of at most
about so many tokens, None where the draw leaves no room.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from longspan.data.chat.compose import bury, count_tokens, num_that_fit
from longspan.data.chat.gold import NAME, NUMBER, UUID, WORD, Exercise, Gold, Turn
from longspan.data.facts import Fact, Group, draw_group
from longspan.data.haystack import draw_haystack
from longspan.data.plan import NEEDLE_LEN
from longspan.data.questions import (
    INTRO,
    SUFFIX_WEIGHTS,
    SUFFIXES,
    Ask,
    ask_absent,
    ask_list,
    ask_one,
    ask_values,
    refusable,
)
from longspan.data.source import Source
from longspan.data.tasks.paragraphs import log_uniform
from longspan.data.vocabulary import Words

ORDER_ASKS = (
    "In which order does the text mention {ks}?", "Which comes first in the text, and what next: "
    "{ks}? Give all of them in order.", "Put {ks} in the order of the text.",
    "Sort by first mention: {ks}.", "List {ks} as the text has them, from first to last.",
    "The text names {ks}. In what order?", "Order these by where they stand in the text: {ks}.",
    "From the beginning to the end of the text, how do {ks} follow each other?",
    "Rank {ks} by their place in the text.", "Restore the text's order of {ks}.")
KINDS = {"uuid": UUID, "word": WORD}
_TURN_TOKENS = 150
"""Room for a question and its reply, about."""


def needle(
    rng: random.Random, source: Source, num_tokens: int, num_turns: int, task: str = "needle"
) -> Exercise | None:
    """Facts in a text, a question about one of them each turn; tasks are those of `TURNS`."""
    scene = _Scene(rng, source, task, num_tokens - num_turns * _TURN_TOKENS, num_turns)
    turns = [TURNS[name](scene) for name in _names(rng, task, num_turns)]
    document = scene.document()
    if document is None or None in turns:
        return None
    if task == "ordering" and not all(_is_in_order(document, turn) for turn in turns):
        return None
    return Exercise(task, document, tuple(turn for turn in turns if turn is not None))


def _names(rng: random.Random, task: str, num_turns: int) -> list[str]:
    """Return what each turn asks for."""
    if task == "mixed":
        return rng.choices(list(MIXED), list(MIXED.values()), k=num_turns)
    # Before an absent key, keys that are there: a refusal is not always right.
    early = "needle" if task == "absent" and rng.random() < 0.5 else task
    return [early] * (num_turns - 1) + [task]


def _is_in_order(document: str, turn: Turn | None) -> bool:
    """Whether the keys are first mentioned in that order: the text around may mention them too."""
    assert turn is not None
    places = [document.find(item) for item in turn.gold.items]
    return places == sorted(places)


class _Scene:
    """Facts of one group, which are asked for in different ways."""

    def __init__(
        self, rng: random.Random, source: Source, task: str, num_tokens: int, num_turns: int
    ) -> None:
        self.rng, self.source, self.num_tokens = rng, source, num_tokens
        family = "record" if task == "key_value" else None
        self.haystack = "needles" if task == "key_value" else draw_haystack(rng)
        most = max(2, num_tokens // (2 * NEEDLE_LEN))
        count = min(most, 4 * num_turns + log_uniform(rng, 2, 2 + max(3, num_tokens // 400)))
        if self.haystack == "needles":
            count = most
        words = Words.draw(rng, source.corpus.words, count, hard=rng.random() < 0.4)
        self.group: Group = draw_group(rng, family, source.wordings)
        used: set[str] = set()
        self.facts = [self.group.make(rng, words, used) for _ in range(count)]
        # One value belongs to one key, or a wrong answer could be right by chance.
        self.facts = list({fact.value: fact for fact in self.facts}.values())
        self.head = ""
        if rng.random() < 0.3:
            intro = rng.choice(INTRO).replace("{n}", self.facts[0].noun)
            self.head = intro + rng.choice(("\n", "\n\n"))
        if self.haystack == "needles":
            room = num_tokens - count_tokens(source.table, self.head)
            texts = [fact.text for fact in self.facts]
            self.facts = self.facts[: num_that_fit(source, texts, room)]
        self.absent = [self.group.make(rng, words, used) for _ in range(num_turns)]
        self.free = list(range(len(self.facts)))
        rng.shuffle(self.free)

    def take(self, count: int) -> list[int] | None:
        """Return facts nobody has asked for, by index, ascending; None where there are fewer."""
        if len(self.free) < count:
            return None
        chosen, self.free = self.free[:count], self.free[count:]
        return sorted(chosen)

    def document(self) -> str | None:
        """Return the text with all facts; None where they leave no room."""
        head = self.head
        room = self.num_tokens - count_tokens(self.source.table, head)
        text = bury(self.rng, self.source, [fact.text for fact in self.facts], self.haystack, room)
        return None if text is None else head + text

    def turn(self, ask: Ask, asked: Sequence[Fact], is_ordered: bool = False) -> Turn:
        """Return the question with its right answer, as values alone or as a sentence."""
        rng, items = self.rng, tuple(fact.value for fact in asked)
        question, frame = frame_of(rng, ask)
        question, refusal = refusable(rng, self.source, question, self.facts[0].noun)
        others = tuple(fact.value for fact in self.facts if fact.value not in items)
        return Turn(question, Gold(
            items=items, others=others[:200], keys=tuple(fact.key for fact in asked),
            kind=KINDS.get(self.facts[0].noun, NUMBER), is_ordered=is_ordered, frame=frame,
            refusal=refusal))


def frame_of(rng: random.Random, ask: Ask) -> tuple[str, str]:
    """Return a question that asks for the values alone and no sentence around them; or, where there
    is one, the question and its sentence."""
    if ask.prefix and rng.random() < 0.3:
        return ask.question, ask.prefix + " {}."
    suffix = rng.choices(SUFFIXES, SUFFIX_WEIGHTS)[0].replace("{n}", ask.noun)
    return f"{ask.question} {suffix}", "{}"


def _one(scene: _Scene) -> Turn | None:
    chosen = scene.take(1)
    if chosen is None:
        return None
    fact = scene.facts[chosen[0]]
    return scene.turn(ask_one(scene.rng, scene.source, fact), [fact])


def _list(scene: _Scene) -> Turn | None:
    chosen = scene.take(scene.rng.choice((2, 3, 4)))
    if chosen is None:
        return None
    facts = [scene.facts[i] for i in scene.rng.sample(chosen, len(chosen))]
    return scene.turn(ask_list(scene.rng, scene.source, facts), facts, is_ordered=True)


def _values(scene: _Scene) -> Turn | None:
    chosen = scene.take(scene.rng.choice((2, 3, 4)))
    if chosen is None:
        return None
    key = scene.facts[chosen[0]].key
    for i in chosen[1:]:
        scene.facts[i] = scene.group.with_key(key, scene.facts[i].value)
    facts = [scene.facts[i] for i in chosen]
    return scene.turn(ask_values(scene.rng, scene.source, facts), facts)


def _absent(scene: _Scene) -> Turn:
    """Ask for a key that the text does not have."""
    fact = scene.absent.pop()
    turn = scene.turn(ask_absent(scene.rng, scene.source, fact), [])
    gold = turn.gold
    return Turn(turn.question, Gold(
        items=(), others=gold.others, keys=(fact.key,), kind=gold.kind, refusal=gold.refusal))


def _order(scene: _Scene) -> Turn | None:
    chosen = scene.take(scene.rng.choice((3, 4, 5)))
    if chosen is None:
        return None
    facts = [scene.facts[i] for i in chosen]
    names = [fact.key for fact in facts]
    ask = scene.rng.choice(scene.source.wordings(ORDER_ASKS)).replace(
        "{ks}", ", ".join(scene.rng.sample(names, len(names))))
    return Turn(ask, Gold(items=tuple(names), kind=NAME, is_ordered=True,
                          refusal="The text does not mention them."))


TURNS = {"needle": _one, "key_value": _one, "multi_query": _list, "multi_value": _values,
         "absent": _absent, "ordering": _order}
MIXED = {"needle": 32, "multi_query": 22, "multi_value": 30, "absent": 16}
"""Shares of the turns where every one is of its own kind."""
