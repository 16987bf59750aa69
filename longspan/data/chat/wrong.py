"""Wrong answers by rule: the mistakes that models make, each with its name."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from longspan.data.chat.gold import COUNT, NAME, NUMBER, UUID, Gold
from longspan.data.vocabulary import ADJECTIVES, NOUNS, digits, pseudo_word, uuid4

INVENTED, NEAR_MISS, OTHER = "invented value", "near miss", "another key's value"
CUT, REPEATED, SWAPPED, EXTRA = "list cut short", "value repeated", "order swapped", "one too many"
FALSE_REFUSAL = "false refusal"
NO_ANSWER = "no value named"
"""A mistake that only models make."""
# As many refusals are wrong as are right: pairs that mostly reward them teach to refuse.
WEIGHTS = {INVENTED: 3, NEAR_MISS: 3, OTHER: 4, CUT: 5, REPEATED: 4, SWAPPED: 3, EXTRA: 2,
           FALSE_REFUSAL: 4}
_HEX = "0123456789abcdef"


def wrong_reply(rng: random.Random, gold: Gold) -> tuple[str, str]:
    """Return a wrong reply and the mistake's name, one of those that the question allows."""
    mistakes = {name: make for name, make in MISTAKES.items() if _is_possible(name, gold)}
    while True:
        name = rng.choices(list(mistakes), [WEIGHTS[name] for name in mistakes])[0]
        items = mistakes[name](rng, gold)
        if items is not None:
            return gold.reply(items), name
        del mistakes[name]
        assert mistakes, "a value can be invented whatever the question"


def _is_possible(name: str, gold: Gold) -> bool:
    count = len(gold.items)
    if not count:
        return name == INVENTED or (name == OTHER and bool(gold.others))
    if name in (OTHER, EXTRA):
        return bool(gold.others) and (name == OTHER or count > 1)
    if name in (CUT, REPEATED):
        return count > 1
    if name == SWAPPED:
        return gold.is_ordered and count > 1
    return True


def invent(rng: random.Random, gold: Gold) -> str:
    """Return a value of the right kind that the text does not have."""
    known = {*gold.items, *gold.others, *gold.keys}
    like = (gold.items or gold.others or ("0" * 7,))[0]
    while True:
        if gold.kind == UUID:
            value = uuid4(rng)
        elif gold.kind == COUNT:
            value = str(max(1, int(like) + rng.choice((-3, -2, -1, 1, 2, 3))))
        elif gold.kind == NUMBER:
            value = digits(rng, len(like))
        elif gold.kind == NAME:
            value = pseudo_word(rng, 2)
        else:
            value = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        if value not in known:
            return value


def near_miss(rng: random.Random, value: str) -> str | None:
    """Return the value with one digit changed or two neighbours swapped; None without digits."""
    places = [i for i, char in enumerate(value) if char in _HEX and i]
    if not places or not any(char.isdigit() for char in value):
        return None
    place = rng.choice(places)
    pairs = [i for i in places if i + 1 < len(value) and value[i + 1] in _HEX
             and value[i] != value[i + 1]]
    if pairs and rng.random() < 0.5:
        place = rng.choice(pairs)
        return value[:place] + value[place + 1] + value[place] + value[place + 2 :]
    alphabet = _HEX if "-" in value else _HEX[:10]
    new = rng.choice([char for char in alphabet if char != value[place]])
    return value[:place] + new + value[place + 1 :]


def _replace_one(rng: random.Random, gold: Gold, value: str | None) -> list[str] | None:
    if value is None or value in gold.items:
        return None
    items = list(gold.items)
    items[rng.randrange(len(items))] = value
    return items


def _invented(rng: random.Random, gold: Gold) -> list[str] | None:
    value = invent(rng, gold)
    return _replace_one(rng, gold, value) if gold.items else [value]


def _near_miss(rng: random.Random, gold: Gold) -> list[str] | None:
    if gold.kind == COUNT:
        return None  # an invented count is near already
    index = rng.randrange(len(gold.items))
    value = near_miss(rng, gold.items[index])
    if value is None or value in {*gold.items, *gold.others}:
        return None
    return [value if i == index else item for i, item in enumerate(gold.items)]


def _other(rng: random.Random, gold: Gold) -> list[str] | None:
    value = rng.choice(gold.others)
    return _replace_one(rng, gold, value) if gold.items else [value]


def _cut(rng: random.Random, gold: Gold) -> list[str]:
    keep = rng.randrange(1, len(gold.items))
    if rng.random() < 0.6:
        return list(gold.items[:keep])
    chosen = sorted(rng.sample(range(len(gold.items)), keep))
    return [gold.items[i] for i in chosen]


def _repeated(rng: random.Random, gold: Gold) -> list[str]:
    """Put a value where another one belongs: the commonest mistake in lists."""
    index, source = rng.sample(range(len(gold.items)), 2)
    return [gold.items[source] if i == index else item for i, item in enumerate(gold.items)]


def _swapped(rng: random.Random, gold: Gold) -> list[str] | None:
    items = list(gold.items)
    first, second = rng.sample(range(len(items)), 2)
    items[first], items[second] = items[second], items[first]
    return items if tuple(items) != gold.items else None


def _extra(rng: random.Random, gold: Gold) -> list[str] | None:
    value = rng.choice(gold.others)
    return None if value in gold.items else [*gold.items, value]


def _refused(rng: random.Random, gold: Gold) -> list[str]:
    return []


MISTAKES: dict[str, Callable[[random.Random, Gold], Sequence[str] | None]] = {
    INVENTED: _invented, NEAR_MISS: _near_miss, OTHER: _other, CUT: _cut, REPEATED: _repeated,
    SWAPPED: _swapped, EXTRA: _extra, FALSE_REFUSAL: _refused}
