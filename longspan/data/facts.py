"""Planted facts: one sentence or record that holds a value, and the ways to ask for it.

Families: RULER's needle sentence (NVIDIA/RULER, Apache-2.0), passkey, key-value records, natural
facts, and sentences of the corpus that a fact is woven into. In templates ``{k}`` is the key,
``{v}`` the value, ``{n}`` number / uuid / word.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from longspan.data.tokens import Kind, Part
from longspan.data.vocabulary import (
    CITIES,
    FIRST_NAMES,
    KEY_KINDS,
    KEY_WEIGHTS,
    LAST_NAMES,
    VALUE_KINDS,
    VALUE_WEIGHTS,
    Words,
    digits,
    make_key,
    make_value,
    value_noun,
)

Option = TypeVar("Option")


class Allowed(Protocol):
    """Says which of several wordings may be used."""

    def __call__(self, options: Sequence[Option], /) -> Sequence[Option]:
        """Return some of the options, one at least."""
        ...


@dataclass(frozen=True, slots=True)
class Fact:
    """One planted fact: ``parts`` is its text without a line end."""

    family: str
    key: str
    value: str
    noun: str
    parts: tuple[Part, ...]
    asks: tuple[tuple[str, str], ...]
    """(question, beginning of the sentence that answers it) in several wordings."""
    is_inline: bool
    """The text is a sentence that may stand in the middle of a paragraph."""

    @property
    def text(self) -> str:
        """The planted text."""
        return "".join(text for text, _ in self.parts)


RULER_ASKS = (
    ("What is the special magic {n} for {k} mentioned in the provided text?",
     "The special magic {n} for {k} mentioned in the provided text is"),)
RULER = "One of the special magic {n}s for {k} is: {v}."
RULER_LOOSE = (
    ("The special magic {n} for {k} is: {v}.", RULER_ASKS),
    ("The magic {n} for {k} is {v}.",
     (("What is the magic {n} for {k}?", "The magic {n} for {k} is"),)),
    ("A secret {n} of {k} is {v}.",
     (("What is the secret {n} of {k}?", "The secret {n} of {k} is"),)),
    ("{v} is the special magic {n} for {k}.", RULER_ASKS))
PASSKEY = "The pass key is {v}. Remember it. {v} is the pass key."
PASSKEY_ASKS = (
    ("What is the pass key?", "The pass key is"),
    ("What is the pass key mentioned in the text?", "The pass key is"))
KEYED_PASSKEY = (
    "The pass key for {k} is {v}. Remember it. {v} is the pass key for {k}.",
    "The pass key for {k} is {v}. Remember it.", "The password for {k} is {v}.")
KEYED_PASSKEY_ASKS = (
    ("What is the pass key for {k}?", "The pass key for {k} is"),
    ("Which pass key belongs to {k}?", "The pass key for {k} is"))
RECORDS = (
    '"{k}": "{v}",', '    "{k}": {v},', "{k} = {v}", "{k}: {v}", "- {k}: {v}", "export {k}={v}",
    "{k}={v}", "{k} = {v}  # do not change", "| {k} | {v} |", "<entry key='{k}'>{v}</entry>",
    "{v}: {k}", "{v} -> {k}", "| {v} | {k} |", "- {v} ({k})",
    "{v}  # {k}")
RECORD_ASKS = (
    ("What is the value of {k}?", "The value of {k} is"),
    ("What value is given for {k} in the text above?", "The value given for {k} is"),
    ("Look up the key {k}. What is its value?", "Its value is"))
NATURAL: tuple[tuple[str, str, str, str], ...] = (
    ("city", "The secret code of {k} is {v}.", "What is the secret code of {k}?",
     "The secret code of {k} is"),
    ("city", "The access number for the {k} office is {v}.",
     "Which access number does the {k} office have?", "The access number for the {k} office is"),
    ("city", "Our warehouse in {k} has the reference {v}.",
     "What is the reference of the warehouse in {k}?", "The reference of the warehouse in {k} is"),
    ("city", "The archive in {k} keeps the file under number {v}.",
     "Under which number does the archive in {k} keep the file?",
     "The archive in {k} keeps the file under number"),
    ("city", "The emergency line in {k} is reached under {v}.",
     "How is the emergency line in {k} reached?", "The emergency line in {k} is reached under"),
    ("city", "The train to {k} carries the identifier {v}.",
     "Which identifier does the train to {k} carry?", "The train to {k} carries the identifier"),
    ("city", "The vault in {k} opens with the combination {v}.",
     "What combination opens the vault in {k}?", "The vault in {k} opens with the combination"),
    ("city", "The shipment bound for {k} was registered as {v}.",
     "How was the shipment bound for {k} registered?",
     "The shipment bound for {k} was registered as"),
    ("person", "{k}'s badge number is {v}.", "What is {k}'s badge number?",
     "{k}'s badge number is"),
    ("person", "{k} was assigned the locker {v}.", "Which locker was {k} assigned?",
     "{k} was assigned the locker"),
    ("person", "The employee number of {k} is {v}.", "What employee number does {k} have?",
     "The employee number of {k} is"),
    ("person", "You can call {k} at {v}.", "At which number can you call {k}?",
     "You can call {k} at"),
    ("person", "{k} signed the contract with number {v}.", "Which contract number did {k} sign?",
     "{k} signed the contract with number"),
    ("person", "The ticket issued to {k} has the number {v}.",
     "What is the number of the ticket issued to {k}?", "The ticket issued to {k} has the number"),
    ("person", "{k} chose {v} as a lucky number.", "What lucky number did {k} choose?",
     "The lucky number {k} chose is"),
    ("person", "The account of {k} is filed under {v}.", "Under what is the account of {k} filed?",
     "The account of {k} is filed under"),
    ("thing", "The serial number of the {k} is {v}.", "What is the serial number of the {k}?",
     "The serial number of the {k} is"),
    ("thing", "The {k} was sold under the order number {v}.",
     "Under which order number was the {k} sold?", "The {k} was sold under the order number"),
    ("thing", "Project {k} received the budget code {v}.",
     "Which budget code did project {k} receive?", "Project {k} received the budget code"),
    ("thing", "The {k} experiment used the seed {v}.", "Which seed did the {k} experiment use?",
     "The {k} experiment used the seed"),
    ("thing", "Ticket {v} tracks the bug in the {k} module.",
     "Which ticket tracks the bug in the {k} module?",
     "The bug in the {k} module is tracked by ticket"),
    ("thing", "The unlock code for the {k} is {v}.", "What unlocks the {k}?",
     "The unlock code for the {k} is"),
    ("thing", "Remember that the {k} weighs {v} grams.", "How many grams does the {k} weigh?",
     "The weight of the {k} in grams is"),
    ("thing", "According to the report, the {k} costs {v} credits.",
     "How many credits does the {k} cost?", "The cost of the {k} in credits is"),
    ("city", "Flight {v} leaves from {k}.", "Which flight leaves from {k}?",
     "The flight that leaves from {k} is"),
    ("city", "The museum of {k} counted {v} visitors.",
     "How many visitors did the museum of {k} count?", "The number of visitors in {k} was"),
    ("city", "In {k} the meter showed {v}.", "What did the meter in {k} show?",
     "The meter in {k} showed"),
    ("city", "The postal code used for {k} is {v}.", "Which postal code is used for {k}?",
     "The postal code used for {k} is"),
    ("city", "Our contact in {k} answers to the code {v}.",
     "To which code does our contact in {k} answer?", "Our contact in {k} answers to the code"),
    ("city", "Gate {v} of the station in {k} stays open.",
     "Which gate of the station in {k} stays open?", "The gate that stays open in {k} is"),
    ("person", "{k} lives in house number {v}.", "In which house number does {k} live?",
     "The house number of {k} is"),
    ("person", "The patient {k} has the file {v}.", "Which file does the patient {k} have?",
     "The file of the patient {k} is"),
    ("person", "{k} finished the race with the start number {v}.",
     "With which start number did {k} finish the race?", "The start number of {k} was"),
    ("person", "For {k} the bank opened account {v}.",
     "Which account did the bank open for {k}?", "The account that was opened for {k} is"),
    ("person", "Room {v} is reserved for {k}.", "Which room is reserved for {k}?",
     "The room reserved for {k} is"),
    ("person", "{k} typed {v} to enter the building.",
     "What did {k} type to enter the building?", "To enter the building {k} typed"),
    ("person", "The invoice to {k} carries number {v}.",
     "Which number does the invoice to {k} carry?", "The invoice to {k} carries number"),
    ("person", "Student {k} got the exam sheet {v}.", "Which exam sheet did student {k} get?",
     "The exam sheet of {k} is"),
    ("thing", "The {k} was built in series {v}.", "In which series was the {k} built?",
     "The series of the {k} is"),
    ("thing", "Shelf {v} holds the {k}.", "Which shelf holds the {k}?",
     "The shelf that holds the {k} is"),
    ("thing", "The patent on the {k} has the number {v}.",
     "What number does the patent on the {k} have?", "The number of the patent on the {k} is"),
    ("thing", "Operation {k} begins at mark {v}.", "At which mark does operation {k} begin?",
     "Operation {k} begins at mark"),
    ("thing", "The license of the {k} ends in {v}.", "In what does the license of the {k} end?",
     "The license of the {k} ends in"),
    ("thing", "Chapter {v} of the handbook explains the {k}.",
     "Which chapter of the handbook explains the {k}?", "The chapter on the {k} is"),
    ("thing", "The counter of the {k} stopped at {v}.", "Where did the counter of the {k} stop?",
     "The counter of the {k} stopped at"),
    ("thing", "{v} copies of the {k} were printed.", "How many copies of the {k} were printed?",
     "The number of printed copies of the {k} is"))
WOVEN_ASKS = (
    ("Which number goes with {k}?", "The number that goes with {k} is"),
    ("What is the number of {k}?", "The number of {k} is"),
    ("Which number does the text connect with {k}?", "The text connects {k} with"),
    ("What number stands in the sentence about {k}?", "The sentence about {k} has the number"),
    ("Where {k} is named, which number is named too?", "The number named with {k} is"),
    ("Which number belongs to {k}?", "To {k} belongs the number"))
FAMILIES = ("ruler", "ruler-loose", "passkey", "record", "natural", "woven")
FAMILY_WEIGHTS = (32, 8, 8, 15, 13, 24)
"""A quarter of all facts have the value first: it is learnt late, and not at all from too few."""


def mark_values(template: str, value: str) -> tuple[Part, ...]:
    """Split a template at ``{v}``: the first value is PLANTED, later ones are COPY."""
    parts: list[Part] = []
    for i, text in enumerate(template.split("{v}")):
        if i:
            parts.append((value, Kind.PLANTED if i == 1 else Kind.COPY))
        if text:
            parts.append((text, Kind.TEXT))
    return tuple(parts)


def _fact(
    family: str, names: tuple[str, str, str], template: str, asks: tuple[tuple[str, str], ...],
    is_inline: bool = True,
) -> Fact:
    key, value, noun = names

    def fill(text: str) -> str:
        return text.replace("{n}", noun).replace("{k}", key)

    filled = tuple((fill(question), fill(answer)) for question, answer in asks)
    return Fact(family, key, value, noun, mark_values(fill(template), value), filled, is_inline)


@dataclass(frozen=True, slots=True)
class Group:
    """A family with its wording fixed: the facts of one group differ only in key and value."""

    family: str
    key_kind: str
    value_kind: str
    template: str
    asks: tuple[tuple[str, str], ...]

    def make(self, rng: random.Random, words: Words, used: set[str]) -> Fact:
        """Make a fact with a key not in ``used`` (which is extended)."""
        key = self._new_key(rng, words, used)
        return self.with_key(key, make_value(rng, self.value_kind, words))

    def with_key(self, key: str, value: str) -> Fact:
        """Return the fact that a key has a value."""
        names = key, value, value_noun(self.value_kind)
        return _fact(self.family, names, self.template, self.asks, self.family != "record")

    def _new_key(self, rng: random.Random, words: Words, used: set[str]) -> str:
        for attempt in range(60):
            key = self._key(rng, words)
            if attempt > 30:
                key = f"{key}-{digits(rng, 3)}"
            # Some questions name nothing but the key, so no other wording may have it, and no other
            # key: of Lima and North Lima there is one.
            name = key.lower().removeprefix("north ").removeprefix("south ")
            if name not in used:
                used.add(name)
                return key
        raise AssertionError("no fresh key in 60 draws")

    def _key(self, rng: random.Random, words: Words) -> str:
        if self.key_kind == "city":
            name = rng.choice(CITIES)
            return name if rng.random() < 0.8 else f"{rng.choice(('North', 'South'))} {name}"
        if self.key_kind == "person":
            return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
        if self.key_kind == "thing":
            return f"{rng.choice(words.adjectives)} {rng.choice(words.nouns)}"
        key = make_key(rng, self.key_kind, words)
        return key.replace("-", "_").upper() if self.template.startswith("export") else key


def draw_group(
    rng: random.Random, family: str | None = None, allowed: Allowed = lambda options: options,
    woven: Callable[[random.Random], str] | None = None,
) -> Group:
    """Return a random group, of a given family or any.

    Args:
        allowed: says which wordings may be used.
        woven: draws a sentence of the corpus with ``{k}`` and ``{v}``; without it none is woven.
    """
    known = FAMILIES if woven is not None else FAMILIES[:-1]
    family = family or rng.choices(known, FAMILY_WEIGHTS[: len(known)])[0]
    key_kind = rng.choices(KEY_KINDS, KEY_WEIGHTS)[0]
    value_kind = rng.choices(VALUE_KINDS, VALUE_WEIGHTS)[0]
    if family == "ruler":
        return Group(family, key_kind, value_kind, RULER, RULER_ASKS)
    if family == "ruler-loose":
        template, asks = rng.choice(RULER_LOOSE)
        return Group(family, key_kind, value_kind, template, asks)
    if family == "passkey":
        kind = rng.choice(("city", "person", "adj-noun", key_kind))
        return Group(family, kind, value_kind, rng.choice(KEYED_PASSKEY), KEYED_PASSKEY_ASKS)
    if family == "record":
        return Group(family, key_kind, value_kind, rng.choice(allowed(RECORDS)), RECORD_ASKS)
    if family == "woven":
        assert woven is not None
        return _woven_group(rng, woven(rng), allowed)
    kind, template, question, answer = rng.choice(allowed(NATURAL))
    value_kind = rng.choices(("7", "5", "digits"), (75, 10, 15))[0]
    return Group(family, kind, value_kind, template, ((question, answer),))


def _woven_group(rng: random.Random, template: str, allowed: Allowed) -> Group:
    """Make a group of a sentence; a third of the questions are the sentence itself."""
    kind = rng.choice(("city", "person", "thing", "adj-noun"))
    name = "{k}" if kind in ("city", "person") else "the {k}"
    text = template.replace("{k}", name)
    ask = rng.choice(allowed(WOVEN_ASKS))
    if rng.random() < 0.33:
        ask = (text.replace("{v}", "which number") + "?", "It is")
    else:
        ask = (ask[0].replace("{k}", name), ask[1].replace("{k}", name))
    return Group("woven", kind, "7", text[:1].upper() + text[1:] + ".", (ask,))


def plain_passkey(rng: random.Random) -> Fact:
    """Make the passkey without a key: at most one in a document."""
    value = digits(rng, rng.choices((7, 5, 10), (6, 3, 1))[0])
    return _fact("passkey", ("", value, "number"), PASSKEY, PASSKEY_ASKS)


def join_list(items: list[str]) -> str:
    """Join to ``a``, ``a and b``, ``a, b, and c`` (RULER's style)."""
    if len(items) < 3:
        return " and ".join(items)
    return ", ".join(items[:-1]) + ", and " + items[-1]
