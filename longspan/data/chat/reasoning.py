"""Exercises that take more than one place of a text: chains of variables, counts of words."""

from __future__ import annotations

import random
from collections import Counter

from longspan.data.chat.compose import MIN_FILLER, bury
from longspan.data.chat.gold import COUNT, NAME, NUMBER, Exercise, Gold, Turn
from longspan.data.chat.retrieval import frame_of
from longspan.data.questions import Ask
from longspan.data.source import Source
from longspan.data.tasks.counting import (
    COMMON_ASKS,
    COUNT_ASKS,
    draw_common_words,
    draw_frequent_words,
)
from longspan.data.tasks.paragraphs import log_uniform
from longspan.data.tasks.variables import ASKS, FORMS, VALUE_ASKS, draw_chains
from longspan.data.tokens import Kind

_LINE = 12
"""Words of a line of a list."""
_ASSIGNMENT_LEN = 16
"""Tokens of an assignment, about."""
_TURN_TOKENS = 120


def variables(
    rng: random.Random, source: Source, num_tokens: int, num_turns: int
) -> Exercise | None:
    """Chains of assignments; each turn asks for the variables of a value, or for the value of a
    variable."""
    room = num_tokens - num_turns * _TURN_TOKENS
    most = max(1, (room - MIN_FILLER) // (6 * _ASSIGNMENT_LEN))
    num_chains = min(most, max(num_turns, log_uniform(rng, 2, max(5, num_tokens // 400))))
    form = rng.choice(source.wordings(FORMS))
    names, values, steps = draw_chains(rng, num_chains)
    facts = [
        form[step > 0].replace("{k}", names[chain][step]).replace("{v}", values[chain]).replace(
            "{s}", names[chain][step - 1]) for chain, step in steps]
    document = bury(rng, source, facts, "corpus" if rng.random() < 0.6 else "noise", room)
    if document is None or num_chains < num_turns:
        return None
    turns = [_ask_chain(rng, source, names, values, chain)
             for chain in rng.sample(range(num_chains), num_turns)]
    return Exercise("variables", document, tuple(turns))


def _ask_chain(
    rng: random.Random, source: Source, names: list[list[str]], values: list[str], chain: int
) -> Turn:
    own, value = names[chain], values[chain]
    refusal = "The text does not say."
    if rng.random() < 0.3:
        name = rng.choice(own)
        ask = Ask(rng.choice(source.wordings(VALUE_ASKS)).replace("{k}", name),
                  f"The value of {name} is", value, "number")
        question, frame = frame_of(rng, ask)
        others = tuple(v for v in values if v != value)
        return Turn(question, Gold(items=(value,), others=others, keys=(name,), kind=NUMBER,
                                   frame=frame, refusal=refusal))
    question, prefix = (text.replace("{v}", value).replace("{n}", str(len(own)))
                        for text in rng.choice(source.wordings(ASKS)))
    question, frame = frame_of(rng, Ask(question, prefix, "", "names"))
    others = tuple(name for i, chain_names in enumerate(names) if i != chain
                   for name in chain_names)
    return Turn(question, Gold(items=tuple(own), others=others[:200], keys=(value,), kind=NAME,
                               frame=frame, by_space=True, refusal=refusal))


def counting(
    rng: random.Random, source: Source, num_tokens: int, num_turns: int
) -> Exercise | None:
    """List words; each turn asks for the most frequent ones or for a count."""
    room = num_tokens - num_turns * _TURN_TOKENS
    if room < 3 * 4 * _LINE:
        return None
    draw = draw_common_words if rng.random() < 0.5 else draw_frequent_words
    words, top = draw(rng, source, room // 3)
    rng.shuffle(words)
    text = _list_that_fits(source, words, room)
    counts = Counter(text.split())
    best = counts.most_common(top + 1)
    if len(best) <= top or best[top - 1][1] == best[top][1]:
        return None
    turns = [_ask_words(rng, source, counts, top) for _ in range(num_turns)]
    return Exercise("counting", text, tuple(turns))


def _list_that_fits(source: Source, words: list[str], num_tokens: int) -> str:
    lines = [" ".join(words[i : i + _LINE]) + "\n" for i in range(0, len(words), _LINE)]
    pieces = source.table.encode([((line, Kind.TEXT),) for line in lines])
    kept, total = [], 0
    for line, piece in zip(lines, pieces, strict=True):
        total += len(piece)
        if total > num_tokens:
            break
        kept.append(line)
    return "".join(kept)


def _ask_words(rng: random.Random, source: Source, counts: Counter[str], top: int) -> Turn:
    refusal = "The list does not have it."
    best = [word for word, _ in counts.most_common(top)]
    if rng.random() < 0.5:
        word, count = rng.choice(counts.most_common(top + 1))
        question, prefix = (text.replace("{w}", word)
                            for text in rng.choice(source.wordings(COUNT_ASKS)))
        question, frame = frame_of(rng, Ask(question, prefix, "", "number"))
        return Turn(question, Gold(items=(str(count),), keys=(word,), kind=COUNT, frame=frame,
                                   refusal=refusal))
    question, prefix = (text.replace("{n}", str(top))
                        for text in rng.choice(source.wordings(COMMON_ASKS)))
    question, frame = frame_of(rng, Ask(question, prefix, "", "words"))
    others = tuple(word for word in sorted(counts) if word not in best)
    return Turn(question, Gold(items=tuple(best), others=tuple(
        rng.sample(others, min(200, len(others)))), kind=NAME, frame=frame, refusal=refusal))
