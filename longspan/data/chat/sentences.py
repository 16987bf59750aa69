"""Facts in sentences of countless wordings, each fact of a text in its own, and their questions.

A sentence has a key and a number, in either order; its question names the key and often shares no
other word with it. So the only way to answer is to find the key and the number of its sentence.
Half of the sentences are written by us, from parts; the others are words of the corpus, into which
key and number are woven: a small model learns a few hundred of our wordings by heart, and takes
any other one for no fact at all.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from longspan.data.chat.compose import bury
from longspan.data.chat.gold import NUMBER, Exercise, Gold, Turn
from longspan.data.questions import (
    SUFFIX_WEIGHTS,
    SUFFIXES,
    refusable,
)
from longspan.data.source import Source
from longspan.data.tasks.paragraphs import log_uniform
from longspan.data.vocabulary import ADJECTIVES, CITIES, FIRST_NAMES, LAST_NAMES, NOUNS, digits
from longspan.data.woven import draw_words, weave

ACTORS = (
    "the clerk", "a neighbour", "our guide", "the committee", "an old ledger", "the inspector",
    "her diary", "the night watch", "a postcard", "the surveyor", "my uncle", "the captain",
    "a reporter", "the archive", "the baker", "the judge", "a tourist", "the printer",
    "the second witness", "the treasurer", "a student", "the mechanic", "the notice",
    "their lawyer", "the porter", "the almanac", "a farmer", "the choir", "the manual",
    "the gardener", "a sailor", "the museum", "the board", "one of the guards", "the label")
DEEDS = (
    ("noted", "note"), ("counted", "count"), ("wrote down", "write down"), ("paid", "pay"),
    ("reported", "report"), ("recorded", "record"), ("listed", "list"), ("asked for", "ask for"),
    ("ordered", "order"), ("found", "find"), ("promised", "promise"), ("collected", "collect"),
    ("lost", "lose"), ("stored", "store"), ("read", "read"), ("gave away", "give away"),
    ("measured", "measure"), ("sold", "sell"), ("saw", "see"), ("carried", "carry"),
    ("entered", "enter"), ("claimed", "claim"), ("printed", "print"), ("received", "receive"))
UNITS = (
    "coins", "barrels", "steps", "tickets", "votes", "pages", "knots", "bricks", "litres",
    "stamps", "letters", "metres", "candles", "sacks", "crates", "hours", "points", "visitors",
    "miles", "drops", "shells", "units", "copies", "stones", "credits", "bolts", "grains", "acres")
LINKS = (
    "for the {k}", "near the {k}", "behind the {k}", "inside the {k}", "under the {k}",
    "because of the {k}", "on behalf of the {k}", "next to the {k}", "when the {k} arrived",
    "after the {k} had closed", "as the {k} passed", "without the {k}", "on the way to the {k}",
    "while the {k} was being mended", "until the {k} could be seen", "in front of the {k}",
    "thanks to the {k}", "from the {k}", "together with the {k}", "long before the {k} was built")
LABELS = (
    "code", "tag", "plate", "box", "file", "entry", "track", "lot", "badge", "locker", "invoice",
    "permit", "form", "line", "slot", "volume", "chart", "key", "pin", "sample", "cabin", "desk",
    "frequency", "mark", "register", "voucher", "docket", "folio", "crate", "wagon", "hangar",
    "berth", "counter", "channel", "plot", "licence", "passport", "drawer", "barrack", "route")
OWNED = (
    "{L} {v} belongs to the {k}.", "{L} {v} was given to the {k}.", "{L} {v} goes with the {k}.",
    "They put the {k} into {l} {v}.", "The {k} is found under {l} {v}.",
    "The {k} has {l} {v}.", "Look up {l} {v} for the {k}.", "{L} {v}, as you know, is the {k}.",
    "The {k} came with {l} {v}.", "Nobody but the {k} may use {l} {v}.",
    "The {k} was moved to {l} {v} yesterday.", "Of all things the {k} got {l} {v}.",
    "{L} {v} opens only for the {k}.", "Since last year {l} {v} means the {k}.",
    "The {l} of the {k} reads {v}.", "On the {k} somebody painted the {l} {v}.",
    "With {l} {v} you get the {k}.", "The {l} {v} can be read on the {k}.",
    "Whoever wants the {k} needs {l} {v}.", "We filed the {k} as {l} {v}.")
OWNED_ASKS = (
    "Which {l} belongs to the {k}?", "What {l} does the {k} have?", "Name the {l} of the {k}.",
    "Under which {l} is the {k}?", "What is the {k}'s {l}?", "Which {l} leads to the {k}?",
    "What {l} was the {k} given?", "The {k} has which {l}?")
ANY_ASKS = (
    "Which number goes with the {k}?", "What number is connected with the {k}?",
    "Which figure does the text give about the {k}?", "What is the number of the {k}?",
    "Which digits stand beside the {k}?", "What number does the {k} bring to mind?",
    "Which number has to do with the {k}?", "How much or how many, in the case of the {k}?",
    "Which value is tied to the {k}?", "What does the text tell in numbers about the {k}?",
    "Who or what has a number and the {k} together? Give the number.", "And the {k}?",
    "Where the {k} comes up, which number comes up too?", "What is the figure for the {k}?",
    "Quote the number from the sentence about the {k}.", "Which number did the {k} get?",
    "Give the number that is named along with the {k}.", "How large is the number of the {k}?",
    "At which number would you look for the {k}?", "The {k}: which number?")
WOVEN = 0.5
"""Share of the sentences whose words are the corpus'."""
ABSENT = 0.15
"""Share of the questions that have no answer in the text."""
BLANKS = ("which number", "how many", "what number", "how much", "what", "which figure")
STARTS = ("Which", "What", "How many", "Where", "Who", "When", "Under which number", "Which number",
          "Tell me which", "At what", "For how many")
_DIGITS = (7, 5, 4, 6, 9, 3, 2), (54, 10, 8, 6, 4, 8, 10)
"""How many a number has, and how often: of a long one only the first tell which is meant."""
_TURN_LEN, _FACT_LEN = 90, 34
"""Tokens of a question with its answer, and of a sentence, about."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """One fact in its own words."""

    key: str
    value: str
    text: str
    question: str


def draw_key(rng: random.Random, words: Sequence[str]) -> str:
    """Draw a key that can follow "the" or stand for itself."""
    style = rng.random()
    if style < 0.5:
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    if style < 0.7:
        return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    if style < 0.85:
        return f"{rng.choice(words)}-{rng.choice(NOUNS)}"
    if style < 0.93:
        return f"{rng.choice(CITIES)} {rng.choice(NOUNS)}"
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def draw_sentence(rng: random.Random, source: Source, key: str) -> Sentence:
    """Draw what a text says about a key, and how it is asked for."""
    value = digits(rng, rng.choices(*_DIGITS)[0])
    if rng.random() < WOVEN:
        return _weave(rng, source, key, value)
    words = source.corpus.words
    own = rng.random() < 0.25
    if rng.random() < 0.45:
        label = rng.choice(words) if own else rng.choice(source.wordings(LABELS))
        text = rng.choice(source.wordings(OWNED))
        text = text.replace("{L}", label.capitalize()).replace("{l}", label)
        question = rng.choice(source.wordings(OWNED_ASKS)).replace("{l}", label)
    else:
        text, question = _deed(rng, source, rng.choice(words) if own else
                               rng.choice(source.wordings(UNITS)))
    if rng.random() < 0.4:
        question = rng.choice(source.wordings(ANY_ASKS))
    if key.istitle():  # a name takes no article
        text, question = (part.replace("the {k}", "{k}") for part in (text, question))
    return Sentence(key, value, _filled(text, key, value), _filled(question, key, value))


def _weave(rng: random.Random, source: Source, key: str, value: str) -> Sentence:
    """Put a key and a number at any places of a natural sentence; half of the questions say
    nothing of it but the key."""
    words = draw_words(rng, source)
    name = key if key.istitle() or rng.random() < 0.2 else f"the {key}"
    said = weave(rng, words, name)
    style = rng.random()
    if style < 0.3:
        question = rng.choice(source.wordings(ANY_ASKS)).replace("the {k}", name)
        question = question.replace("{k}", key)
    elif style < 0.55:
        question = said.replace("{v}", rng.choice(BLANKS)) + "?"
    else:
        own = words if rng.random() < 0.4 else rng.choices(source.corpus.words, k=8)
        around = rng.sample(own, min(len(own), rng.randrange(1, 6)))
        at = rng.randrange(len(around) + 1)
        question = " ".join((rng.choice(STARTS), *around[:at], name, *around[at:])).rstrip(",")
        question += "?"
    return Sentence(key, value, _filled(said + ".", key, value), _filled(question, key, value))


def _filled(text: str, key: str, value: str) -> str:
    text = text.replace("{k}", key).replace("{v}", value)
    return text[:1].upper() + text[1:]


def _deed(rng: random.Random, source: Source, unit: str) -> tuple[str, str]:
    """Return a sentence in which somebody does something to so many things, and its question."""
    actor = rng.choice(source.wordings(ACTORS))
    past, plain = rng.choice(source.wordings(DEEDS))
    link = rng.choice(source.wordings(LINKS))
    text = rng.choice((
        f"{actor} {past} {{v}} {unit} {link}.", f"{link}, {actor} {past} {{v}} {unit}.",
        f"{{v}} {unit} is what {actor} {past} {link}.", f"{actor} {past} {unit} {link}: {{v}}.",
        f"{link} there were {{v}} {unit}.", f"{{v}} {unit} were {link}, said {actor}."))
    question = rng.choice((
        f"how many {unit} did {actor} {plain} {link}?", f"what did {actor} {plain} {link}?",
        f"how many {unit} were there {link}?", f"{actor} {past} how many {unit} {link}?",
        "how many {u} has the {k} to do with?".replace("{u}", unit)))
    return text, question


def sentences(
    rng: random.Random, source: Source, num_tokens: int, num_turns: int
) -> Exercise | None:
    """Facts in a text, each in its own words; some questions have no answer there."""
    room = num_tokens - num_turns * _TURN_LEN
    count = num_turns + log_uniform(rng, 2, max(5, room // 400))
    if count * 2 * _FACT_LEN > room:
        return None
    keys = _draw_keys(rng, source, count + num_turns)
    facts = [draw_sentence(rng, source, key) for key in keys]
    absent, facts = facts[count:], facts[:count]
    facts = list({fact.value: fact for fact in facts}.values())
    if len(facts) < num_turns:
        return None
    document = bury(rng, source, [fact.text for fact in facts],
                    "corpus" if rng.random() < 0.9 else "noise", room)
    if document is None:
        return None
    asked = [absent[i] if rng.random() < ABSENT else fact
             for i, fact in enumerate(rng.sample(facts, num_turns))]
    values = tuple(fact.value for fact in facts)
    keys_there = {fact.key for fact in facts}
    turns = []
    for fact in asked:
        # an absent one may by chance have a number that another one in the text has
        items = (fact.value,) if fact.key in keys_there else ()
        question, refusal = instructed(rng, source, fact.question, "number")
        turns.append(Turn(question, Gold(
            items=items, others=tuple(v for v in values if v not in items)[:200], keys=(fact.key,),
            kind=NUMBER, refusal=refusal)))
    return Exercise("sentences", document, tuple(turns))


def _draw_keys(rng: random.Random, source: Source, count: int) -> list[str]:
    """Draw different keys; in a third of the texts they share their words."""
    if rng.random() < 0.33 and count >= 4:
        side = min(30, int((3 * count) ** 0.5) + 2)
        first, second = rng.sample(ADJECTIVES, side), rng.sample(NOUNS, side)
        pairs = [f"{a}-{b}" for a in first for b in second]
        if len(pairs) >= count:
            return rng.sample(pairs, count)
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[draw_key(rng, source.corpus.words)] = None
    return list(keys)


def instructed(
    rng: random.Random, source: Source, question: str, noun: str
) -> tuple[str, str]:
    """Return a question that asks for the value alone, and what answers it when there is none; in
    some the instruction says what."""
    question += " " + rng.choices(SUFFIXES, SUFFIX_WEIGHTS)[0].replace("{n}", noun)
    return refusable(rng, source, question, noun)
