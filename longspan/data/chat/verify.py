"""Whether a reply is right, by the values that it names; if not, which mistake it makes."""

from __future__ import annotations

import re
from collections import Counter

from longspan.data.chat.gold import COUNT, NAME, NUMBER, UUID, WORD, Gold
from longspan.data.chat.wrong import (
    CUT,
    EXTRA,
    FALSE_REFUSAL,
    INVENTED,
    NEAR_MISS,
    NO_ANSWER,
    OTHER,
    REPEATED,
    SWAPPED,
)

PATTERNS = {
    NUMBER: r"\d{2,}", COUNT: r"\d+", WORD: r"[a-z]+-[a-z]+",
    UUID: r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"}
"""What else in a reply is taken for a value."""
REFUSED = re.compile(
    r"\b(?:does not|doesn't|do not|don't|did not|didn't|is not|isn't|are not|not|never|no such|no|"
    r"cannot|can't|unable|unknown)\b", re.IGNORECASE)


def find_mistake(reply: str, gold: Gold) -> str | None:
    """Return the name of a reply's mistake; None: it is right."""
    found = find_values(reply, gold)
    if not gold.items:
        if not found:
            return None if REFUSED.search(reply) else NO_ANSWER
        return OTHER if found[0] in gold.others else INVENTED
    if not found:
        return FALSE_REFUSAL if REFUSED.search(reply) else NO_ANSWER
    if len(gold.items) == 1:
        found = list(dict.fromkeys(found))  # a sentence may say it twice
    wanted, named = Counter(gold.items), Counter(found)
    if named == wanted:
        return SWAPPED if gold.is_ordered and tuple(found) != gold.items else None
    strange = [value for value in found if value not in wanted]
    if strange:
        if not wanted - named:
            return EXTRA
        if strange[0] in gold.others:
            return OTHER
        return NEAR_MISS if any(_are_near(strange[0], item) for item in wanted) else INVENTED
    return REPEATED if named - wanted else CUT


def find_values(reply: str, gold: Gold) -> list[str]:
    """Return the values in a reply, in order; what the question named is none, nor is a word of the
    sentence that a right reply puts them in."""
    reply = reply.removeprefix(gold.frame.partition("{}")[0])
    for key in sorted(set(gold.keys) - {*gold.items, *gold.others}, key=len, reverse=True):
        reply = reply.replace(key, " ")
    known = sorted({*gold.items, *gold.others}, key=lambda value: (-len(value), value))
    forms = [rf"(?<!\w){re.escape(value)}(?!\w)" for value in known]
    if gold.kind in PATTERNS:
        forms.append(rf"(?<!\w)(?:{PATTERNS[gold.kind]})(?!\w)")
    # Lists of names hold nothing else; where one is asked for, a sentence stands around it.
    if gold.kind == NAME and not forms:
        return []
    return re.findall("|".join(forms), reply)


def _are_near(first: str, second: str) -> bool:
    """Whether two values of a length differ in two places at the most."""
    return len(first) == len(second) and sum(
        a != b for a, b in zip(first, second, strict=True)) <= 2
