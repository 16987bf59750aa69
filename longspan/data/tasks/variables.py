"""Variable tracking: which variables of chains of assignments have a given value.

A chain begins with a value; each further variable takes that of the one before. Chains have two to
six variables, which stand in their order at random depths; a row of 4,096 tokens has up to eight
chains, a longer one more. Every chain is asked for, and a variable of it for its value. Distance:
from the chain's beginning.
"""

from __future__ import annotations

import random

from longspan.data.draft import Sample
from longspan.data.facts import Fact, mark_values
from longspan.data.layout import lay_out
from longspan.data.plan import Question, RowPlan, num_questions
from longspan.data.questions import Ask, render
from longspan.data.source import Source
from longspan.data.tasks.paragraphs import log_uniform
from longspan.data.tokens import Kind, Part
from longspan.data.vocabulary import digits, pseudo_word

FORMS = (
    ("VAR {k} = {v}", "VAR {k} = VAR {s}"), ("{k} = {v}", "{k} = {s}"),
    ("let {k} = {v};", "let {k} = {s};"), ("set {k} to {v}", "set {k} to {s}"),
    ("{k} := {v}", "{k} := {s}"), ("The value of {k} is {v}.", "{k} has the same value as {s}."))
"""First and further assignments (the first form is RULER's, NVIDIA/RULER, Apache-2.0)."""
ASKS = (
    ("Find all variables that are assigned the value {v} in the text above.",
     "According to the chain(s) of variable assignment in the text above, {n} variables are "
     "assigned the value {v}, they are:"),
    ("Which variables have the value {v}?", "The variables with the value {v} are:"),
    ("List every variable that is equal to {v}.", "Equal to {v} are:"),
    ("Whose value is {v}? Name all of them.", "The value {v} belongs to:"),
    ("What are the names of all variables that hold {v}?", "These variables hold {v}:"),
    ("Give all names that stand for {v}.", "These names stand for {v}:"))
"""RULER's question first."""
VALUE_ASKS = ("What is the value of {k}?", "Which value does {k} have in the end?",
              "Follow the assignments: what is {k}?", "Resolve {k}.", "{k} = ?")
_CHARS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def track_variables(rng: random.Random, source: Source, length: int) -> Sample | None:
    """Return a row of exactly ``length`` tokens with chains of assignments and questions."""
    is_chat = source.table.has_chat and rng.random() < 0.65
    form = rng.choice(source.wordings(FORMS))
    num_chains = log_uniform(rng, 1, max(5, num_questions(length) // 3))
    names, values, steps = draw_chains(rng, num_chains)
    plan = RowPlan(is_chat, "corpus" if rng.random() < 0.6 else "noise", "")
    plan.facts = [_fact(names[chain], step, values[chain], form) for chain, step in steps]
    plan.depths = sorted(rng.random() for _ in steps)
    for chain in rng.sample(range(num_chains), num_chains):
        facts = tuple(i for i, (c, _) in enumerate(steps) if c == chain)
        for ask in _asks(rng, source, names[chain], values[chain]):
            plan.questions.append(
                Question(render(rng, is_chat, ask), -1, rng.random(), facts))
    return lay_out(rng, source, plan, length, "variables")


def draw_chains(
    rng: random.Random, num_chains: int
) -> tuple[list[list[str]], list[str], list[tuple[int, int]]]:
    """Draw chains: the names of each, its value, and the order in which steps (chain, index)
    stand."""
    chains = [rng.randrange(2, 7) for _ in range(num_chains)]
    used: set[str] = set()
    names = [[_name(rng, used) for _ in range(count)] for count in chains]
    values = [_value(rng, used) for _ in chains]
    return names, values, _interleave(rng, chains)


def _interleave(rng: random.Random, counts: list[int]) -> list[tuple[int, int]]:
    """Return steps (chain, index) of all chains, each chain's own in order."""
    order = [chain for chain, count in enumerate(counts) for _ in range(count)]
    rng.shuffle(order)
    seen = [0] * len(counts)
    steps = []
    for chain in order:
        steps.append((chain, seen[chain]))
        seen[chain] += 1
    return steps


def _fact(names: list[str], step: int, value: str, form: tuple[str, str]) -> Fact:
    text = form[step > 0].replace("{k}", names[step])
    parts: tuple[Part, ...] = mark_values(text, value)
    if step:
        parts = ((text.replace("{s}", names[step - 1]), Kind.TEXT),)
    return Fact("variables", names[step], value, "number", parts, (), False)


def _asks(rng: random.Random, source: Source, names: list[str], value: str) -> list[Ask]:
    question, prefix = (
        text.replace("{v}", value).replace("{n}", str(len(names)))
        for text in rng.choice(source.wordings(ASKS)))
    name = rng.choice(names)
    single = rng.choice(source.wordings(VALUE_ASKS)).replace("{k}", name)
    return [Ask(question, prefix, " ".join(names), "name"),
            Ask(single, f"The value of {name} is", value, "number")]


def _name(rng: random.Random, used: set[str]) -> str:
    while True:
        name = "".join(rng.choices(_CHARS, k=5)) if rng.random() < 0.7 else pseudo_word(rng, 2)
        if name not in used:
            used.add(name)
            return name


def _value(rng: random.Random, used: set[str]) -> str:
    while True:
        value = digits(rng, 5)
        if value not in used:
            used.add(value)
            return value
