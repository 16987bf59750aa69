"""Exercises in the very form of RULER's prompts (NVIDIA/RULER, Apache-2.0), solved examples and
beginnings of answers included; keys, texts and lists are our own.
"""

from __future__ import annotations

import random
from collections import Counter

from longspan.data.chat.compose import MIN_FILLER, bury, count_tokens, num_that_fit
from longspan.data.chat.gold import NAME, NUMBER, UUID, WORD, Exercise, Gold, Turn
from longspan.data.facts import RULER
from longspan.data.haystack import NOISE
from longspan.data.source import Source
from longspan.data.tasks.paragraphs import log_uniform
from longspan.data.vocabulary import Words, digits, make_key, make_value, pseudo_word

NIAH_HEAD = ("Some special magic {n}s are hidden within the following text. Make sure to memorize "
             "it. I will quiz you about the {n}s afterwards.\n")
VT_HEAD = ("Memorize and track the chain(s) of variable assignment hidden in the following text."
           "\n\n")
VT_ASK = "Question: Find all variables that are assigned the value {v} in the text above."
VT_FRAME = (" Answer: According to the chain(s) of variable assignment in the text above, {n} "
            "variables are assigned the value {v}, they are: ")
CWE_HEAD = ("Below is a numbered list of words. In these words, some appear more often than "
            "others. Memorize the ones that appear most often.\n")
CWE_ASK = "Question: What are the {n} most common words in the above list?"
CWE_FRAME = " Answer: The top {n} words that appear most often in the list are:"
FWE_HEAD = ("Read the following coded text and track the frequency of each coded word. Find the "
            "three most frequently appeared coded words. ")
FWE_ASK = ("Question: Do not provide any explanation. Please ignore the dots '....'. What are the "
           "three most frequently appeared words in the above coded text?")
FWE_FRAME = (" Answer: According to the coded text above, the three most frequently appeared words "
             "are:")
REFUSAL = "The text does not say."
VALUES = (15, 10, 15, 60)
"""Shares of keys with one to four values in documents where keys have several. Four, as in RULER,
are most of them: the last of several values is what a small model misses longest."""
_NEEDLE_LEN, _HOP_LEN = 32, 16
_NIAH_TURN, _VT_TURN = 110, 110
"""Tokens of a question with its answer, about."""


def ruler_niah(
    rng: random.Random, source: Source, num_tokens: int, num_turns: int
) -> Exercise | None:
    """Needles with one to four values a key; a question asks for one to four keys."""
    room = num_tokens - num_turns * _NIAH_TURN - 60
    haystack = rng.choices(("corpus", "noise", "needles"), (68, 12, 20))[0]
    uuids = 30 if haystack == "needles" else 7
    noun = rng.choices(("number", "word", "uuid"), (93 - uuids, 7, uuids))[0]
    kind = {"number": "7", "word": "words", "uuid": "uuid"}[noun]
    most = max(1, room // (4 * _NEEDLE_LEN * (2 if noun == "uuid" else 1)))
    num_keys = min(most, log_uniform(rng, num_turns, 4 * num_turns + max(2, room // 1500)))
    if haystack == "needles":
        num_keys = room // (_NEEDLE_LEN - 6)
    if num_keys < num_turns:
        return None
    words = Words.draw(rng, source.corpus.words, num_keys, hard=rng.random() < 0.3)
    key_kind = rng.choices(("adj-noun", "mixed", "uuid", "pseudo"), (76, 10, 6, 8))[0]
    if noun == "uuid" and rng.random() < 0.6:
        key_kind = "uuid"
    keys = list(dict.fromkeys(make_key(rng, key_kind, words) for _ in range(num_keys)))
    values: dict[str, list[str]] = {}
    used: set[str] = set()
    is_single = rng.random() < 0.3 or haystack == "needles"
    for key in keys:
        count = 1 if is_single else rng.choices((1, 2, 3, 4), VALUES)[0]
        values[key] = []
        while len(values[key]) < count:
            value = make_value(rng, kind, words)
            if value not in used:
                used.add(value)
                values[key].append(value)
    pairs = [(key, value) for key in keys for value in values[key]]
    rng.shuffle(pairs)
    facts = [RULER.replace("{n}", noun).replace("{k}", key).replace("{v}", value)
             for key, value in pairs]
    if haystack == "needles":
        pairs = pairs[: num_that_fit(source, facts, room)]
        facts = facts[: len(pairs)]
    if len(pairs) < num_turns:
        return None
    document = bury(rng, source, facts, haystack, room)
    if document is None:
        return None
    in_text: dict[str, list[str]] = {}
    for key, value in pairs:
        in_text.setdefault(key, []).append(value)
    head = NIAH_HEAD.replace("{n}", noun)
    turns = tuple(_ask_needles(rng, in_text, noun) for _ in range(num_turns))
    return Exercise("ruler_niah", head + document, turns, joint="\n")


def _ask_needles(rng: random.Random, in_text: dict[str, list[str]], noun: str) -> Turn:
    count = min(len(in_text), rng.choices((1, 2, 3, 4), (55, 7, 8, 30))[0])
    asked = rng.sample(list(in_text), count)
    items = tuple(value for key in asked for value in in_text[key])
    if len(items) > 8:  # an answer is to fit RULER's 128 tokens
        asked = asked[:2]
        items = tuple(value for key in asked for value in in_text[key])
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    asks, says, nouns = ("are all", "are", noun + "s") if len(items) > 1 else ("is", "is", noun)
    what = f"special magic {nouns} for {query} mentioned in the provided text"
    question, frame = f"What {asks} the {what}?", f" The {what} {says} {{}}."
    if rng.random() < 0.25:
        question += f" Answer with the {nouns} only."
        frame = "{}"
    others = tuple(value for values in in_text.values() for value in values if value not in items)
    return Turn(question, Gold(
        items=items, others=others[:200], keys=tuple(asked),
        kind={"number": NUMBER, "uuid": UUID, "word": WORD}[noun], frame=frame, refusal=REFUSAL,
        is_ordered=len(asked) > 1))


def ruler_variables(
    rng: random.Random, source: Source, num_tokens: int, num_turns: int
) -> Exercise | None:
    """Chains of one to five hops in RULER's noise or in text, behind a solved example mostly."""
    # RULER's beginning of the answer ends in a space, and a name is a token together with its own.
    gap = " " if rng.random() < 0.6 else ""
    solved = _solved_chain(rng, gap) if rng.random() < 0.85 else ""
    num_solved = count_tokens(source.table, solved)
    if num_solved > num_tokens // 2:
        solved, num_solved = "", 0
    room = num_tokens - num_turns * _VT_TURN - num_solved - 40
    most = (room - MIN_FILLER) // (6 * _HOP_LEN)
    num_chains = num_turns + (rng.random() < 0.4) * rng.randrange(1, 4)
    if num_chains > most:
        return None
    names, values = _draw_names(rng, num_chains, 5), [digits(rng, 5) for _ in range(num_chains)]
    if len(set(values)) < num_chains:
        return None
    order = [chain for chain, own in enumerate(names) for _ in own]
    rng.shuffle(order)
    seen, facts = [0] * num_chains, []
    for chain in order:
        facts.append(_statement(names[chain], seen[chain], values[chain]))
        seen[chain] += 1
    document = bury(rng, source, facts, "noise" if rng.random() < 0.6 else "corpus", room)
    if document is None:
        return None
    turns = tuple(_ask_chain(names, values, chain, gap)
                  for chain in rng.sample(range(num_chains), num_turns))
    return Exercise("ruler_variables", solved + VT_HEAD + document, turns, joint="\n")


def _statement(names: list[str], step: int, value: str) -> str:
    return f"VAR {names[step]} = {value}" if not step else (
        f"VAR {names[step]} = VAR {names[step - 1]} ")


def _draw_names(rng: random.Random, num_chains: int, length: int) -> list[list[str]]:
    used: set[str] = set()
    chains: list[list[str]] = []
    for _ in range(num_chains):
        wanted = rng.choices((2, 3, 4, 5, 6), (8, 10, 12, 60, 10))[0]
        names: list[str] = []
        while len(names) < wanted:
            name = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=length))
            if name not in used:
                used.add(name)
                names.append(name)
        chains.append(names)
    return chains


def _solved_chain(rng: random.Random, gap: str) -> str:
    (names,), value = _draw_names(rng, 1, 3), digits(rng, 5)
    lines = [NOISE] * rng.randrange(4, 14)
    places = sorted(rng.randrange(len(lines)) for _ in names)
    for step, place in enumerate(places):
        lines.insert(place + step, _statement(names, step, value) + "\n")
    ask, frame = _vt_texts(names, value)
    return f"{VT_HEAD}{''.join(lines)}{ask}{frame}{gap}{' '.join(names)}\n\n"


def _vt_texts(names: list[str], value: str) -> tuple[str, str]:
    return (VT_ASK.replace("{v}", value),
            VT_FRAME.replace("{v}", value).replace("{n}", str(len(names))))


def _ask_chain(names: list[list[str]], values: list[str], chain: int, gap: str) -> Turn:
    ask, frame = _vt_texts(names[chain], values[chain])
    others = tuple(name for i, own in enumerate(names) if i != chain for name in own)
    return Turn(ask, Gold(
        items=tuple(names[chain]), others=others[:200], keys=(values[chain],), kind=NAME,
        frame=frame + gap + "{}", by_space=True, refusal=REFUSAL))


def ruler_words(
    rng: random.Random, source: Source, num_tokens: int, num_turns: int
) -> Exercise | None:
    """Ask for the common words of a numbered list, or the frequent ones of a coded text."""
    return (_common if rng.random() < 0.6 else _frequent)(rng, source, num_tokens)


def _common(rng: random.Random, source: Source, num_tokens: int) -> Exercise | None:
    top = 10 if rng.random() < 0.8 else rng.randrange(3, 10)
    solved_words = _numbered_words(rng, source, 40, top, 10, 3) if rng.random() < 0.7 else None
    solved = ""
    if solved_words:
        entries, best = solved_words
        solved = (CWE_HEAD + _numbered(entries) + "\n" + CWE_ASK.replace("{n}", str(top))
                  + CWE_FRAME.replace("{n}", str(top)) + " " + _numbered(best) + "\n")
    room = num_tokens - count_tokens(source.table, solved) - 160
    if room < num_tokens // 2:
        solved, room = "", num_tokens - 160
    often, rare = rng.choice(((30, 3), (30, 3), (12, 2), (6, 1)))
    for _ in range(4):
        num_words = top + (room // 6 - top * often) // rare
        if num_words < 2 * top:
            often, rare = 6, 1
            continue
        entries, best = _numbered_words(rng, source, num_words, top, often, rare)
        text = _numbered(entries)
        if count_tokens(source.table, text) <= room:
            ask = CWE_ASK.replace("{n}", str(top))
            others = sorted(set(entries) - set(best))
            gold = Gold(
                items=tuple(best), others=tuple(rng.sample(others, min(50, len(others)))),
                kind=NAME, by_space=True, is_numbered=True, refusal="The list does not have it.",
                frame=CWE_FRAME.replace("{n}", str(top)) + " {}")
            return Exercise("ruler_words", solved + CWE_HEAD + text, (Turn(ask, gold),), joint="\n")
        room = int(0.85 * room)
    return None


def _numbered_words(
    rng: random.Random, source: Source, num_words: int, top: int, often: int, rare: int
) -> tuple[list[str], list[str]]:
    """Return a shuffled list, and the words that are there more often, in the list's order."""
    pool = source.corpus.words
    words = rng.sample(pool, min(len(pool), num_words))
    entries = words[:top] * often + words[top:] * rare
    rng.shuffle(entries)
    best = set(words[:top])
    return entries, list(dict.fromkeys(word for word in entries if word in best))


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _frequent(rng: random.Random, source: Source, num_tokens: int) -> Exercise | None:
    room = num_tokens - 160
    most = max(8, room // 50)
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["...", *dict.fromkeys(
        "".join(rng.choices(letters, k=6)) if rng.random() < 0.8 else pseudo_word(rng, 2)
        for _ in range(most))]
    total = room // 5
    power = rng.choice((2.0, 2.0, 2.0, 1.6, 2.4))
    shares = [(i + 1) ** -power for i in range(len(names))]
    counts = [int(total * share / sum(shares)) for share in shares]
    if counts[3] < 1 or counts[3] == counts[4]:
        return None
    listed = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    rng.shuffle(listed)
    lengths = {name: count_tokens(source.table, " " + name) for name in dict.fromkeys(listed)}
    used, kept = 0, []
    for name in listed:
        used += lengths[name]
        if used > room:
            break
        kept.append(name)
    found = [(name, n) for name, n in Counter(kept).most_common() if name != "..."][:4]
    if len(found) < 4 or len({n for _, n in found}) < 4:
        return None
    gold = Gold(items=tuple(name for name, _ in found[:3]), kind=NAME,
                others=tuple(name for name in sorted(set(kept))[:50]
                             if name not in {n for n, _ in found[:3]} and name != "..."),
                frame=FWE_FRAME + " {}.", refusal="The list does not have it.")
    return Exercise("ruler_words", FWE_HEAD.rstrip() + " " + " ".join(kept), (Turn(FWE_ASK, gold),),
                    joint="\n")
