r"""Questions about planted facts as text: frames, wordings, refusals.

Two frames. *Raw* rows are plain text with lines like ``Question: ...\nAnswer: ...``. *Chat* rows
are ChatML: the document stands in a user turn, a question follows it after a blank line, the answer
is the assistant's turn, and the document may go on in the next user turn.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from longspan.data.facts import Fact, join_list
from longspan.data.source import Source
from longspan.data.tokens import IM_END, IM_START, Kind, Part

INTRO = (
    "Some special magic {n}s are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the {n}s afterwards.",
    "Some special magic {n}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {n}s afterwards.",
    "A special magic {n} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {n} afterwards.",
    "Read the following text carefully. Questions about it follow.",
    "There is important information hidden inside a lot of irrelevant text. Find it.")
SUFFIXES = (
    "Answer with the {n} only.", "Reply with the {n} only.", "Give only the {n}.",
    "Only the {n}, please.")
SUFFIX_WEIGHTS = (80, 8, 6, 6)
LEADS = (
    "According to the text, ", "Based on the text above, ", "From the text: ", "Tell me: ",
    "Using the document, ", "Please answer: ", "One question: ", "Think back: ",
    "In the text above, ", "Quick check: ")
TAILS = (
    " Use the text above.", " It is stated in the text.", " Look carefully.", " Be exact.",
    " Do not guess.")
PHRASES = (
    "Tell me {p}.", "State {p}.", "Give me {p}.", "I need to know {p}.", "{P}?",
    "Look for {p} in the text.", "Report {p}.", "Do you remember {p}?", "Find {p}.",
    "What does the text say about {p}?")
"""Questions for what a sentence names that begins "The ... is"."""
CLOZES = (
    "Complete: {p} ...", "Fill in what is missing: {p} ___", "Finish the sentence: {p}",
    "{p} what?", "Go on as the text does: {p}")
"""Questions that begin the answer's sentence."""
PLURAL = (
    "{q} There are several; list them all.", "{q} List every one that the text gives.",
    "{q} Give all of them, in the order of the text.", "{q} Name each of them.",
    "{q} More than one is mentioned. Which?")
LISTS = (
    "Answer each of these: {qs}", "{qs} Answer in this order.", "Several questions: {qs}",
    "{qs}", "Give one answer after the other. {qs}")
REFUSALS = (
    "The text does not say.", "That is not in the text.", "The text does not mention it.",
    "There is no such {n} in the text.")
REFUSAL_WEIGHTS = (70, 10, 10, 10)
"""What answers a question about something that the text does not hold."""
ABSENT_RULES = (
    "If the text does not say it, write: {r}.", "Should the text have nothing on it, say: {r}.",
    "If it is missing, answer with: {r}.", "Say {r} if there is none.",
    "When the text is silent about it, reply: {r}.", "If you cannot find it, answer: {r}.",
    "If there is no such {n}, the answer is: {r}.", "Write {r} when it is not there.")
"""What else an instruction asks for; ``{r}`` is a refusal, ``{n}`` the kind of value."""
SHORT_REFUSALS = ("not given", "not stated", "not found", "no such {n}", "unknown",
                  "not available", "not present", "not provided")
RAW_FRAMES = (
    ("Question: {}\nAnswer:", " {}\n"), ("Q: {}\nA:", " {}\n"), ("{}\n>", " {}\n"),
    ("### Question\n{}\n### Answer\n", "{}\n"), ("User: {}\nAssistant:", " {}\n"))
RAW_WEIGHTS = (60, 12, 8, 12, 8)


@dataclass(frozen=True, slots=True)
class Ask:
    """A question before it has a frame."""

    question: str
    prefix: str
    """Beginning of the sentence that answers; empty: the value alone is a sentence."""
    value: str
    noun: str
    is_said: bool = True
    """The prefix alone says what is asked for."""


def ask_one(rng: random.Random, source: Source, fact: Fact) -> Ask:
    """Return a question about one fact, in one of many wordings."""
    question, prefix = rng.choice(fact.asks)
    is_said = fact.key in prefix
    if rng.random() < 0.4 or source.is_held_out:
        question = reword(rng, source, question, prefix, is_said)
    return Ask(question, prefix, fact.value, fact.noun, is_said)


def reword(
    rng: random.Random, source: Source, question: str, prefix: str, is_said: bool = True
) -> str:
    """Return the question asked by another sentence, or with words before or behind it."""
    if not is_said:
        return question + rng.choice(source.wordings(TAILS))
    phrase = prefix[:1].lower() + prefix.removesuffix(" is")[1:]
    if prefix.startswith("The ") and prefix.endswith(" is") and rng.random() < 0.5:
        form = rng.choice(source.wordings(PHRASES))
        return form.replace("{p}", phrase).replace("{P}", phrase[:1].upper() + phrase[1:])
    style = rng.random()
    if style < 0.25:
        return rng.choice(source.wordings(CLOZES)).replace("{p}", prefix)
    if style < 0.7:
        begin = question[:1].lower() if question.startswith(("W", "H", "Under")) else question[:1]
        return rng.choice(source.wordings(LEADS)) + begin + question[1:]
    return question + rng.choice(source.wordings(TAILS))


def ask_values(rng: random.Random, source: Source, facts: Sequence[Fact]) -> Ask:
    """All values of one key."""
    first = facts[0]
    values = join_list([fact.value for fact in facts])
    if first.family == "ruler" and rng.random() < 0.6:
        return Ask(*ruler_plural(first.noun, first.key), values, first.noun + "s")
    form = rng.choice(source.wordings(PLURAL))
    return Ask(form.replace("{q}", rng.choice(first.asks)[0]), "They are", values,
               first.noun + "s", is_said=False)


def ask_list(rng: random.Random, source: Source, facts: Sequence[Fact]) -> Ask:
    """Return the values of several keys, in the order of the question."""
    first = facts[0]
    values = join_list([fact.value for fact in facts])
    if first.family == "ruler" and rng.random() < 0.6:
        keys = join_list([fact.key for fact in facts])
        return Ask(*ruler_plural(first.noun, keys), values, first.noun + "s")
    index = rng.randrange(len(first.asks))
    questions = " ".join(fact.asks[index][0] for fact in facts)
    form = rng.choice(source.wordings(LISTS))
    return Ask(form.replace("{qs}", questions), "The answers are", values, first.noun + "s",
               is_said=False)


def ask_absent(rng: random.Random, source: Source, fact: Fact) -> Ask:
    """Return a question about a fact that was not planted; its answer says so."""
    asked = ask_one(rng, source, fact)
    refusal = rng.choices(REFUSALS, REFUSAL_WEIGHTS)[0].replace("{n}", fact.noun)
    return Ask(asked.question, "", refusal, fact.noun)


def refusable(
    rng: random.Random, source: Source, question: str, noun: str
) -> tuple[str, str]:
    """Return the question, in some with a rule for what the text does not say; and the refusal."""
    if rng.random() < 0.4:
        refusal = rng.choice(SHORT_REFUSALS).replace("{n}", noun)
        rule = rng.choice(source.wordings(ABSENT_RULES))
        return f"{question} {rule.replace('{r}', refusal).replace('{n}', noun)}", refusal
    return question, rng.choices(REFUSALS, REFUSAL_WEIGHTS)[0].replace("{n}", noun)


def ruler_plural(noun: str, keys: str) -> tuple[str, str]:
    """RULER's plural question and the beginning of its answer."""
    what = f"special magic {noun}s for {keys} mentioned in the provided text"
    return f"What are all the {what}?", f"The {what} are"


def render(rng: random.Random, is_chat: bool, ask: Ask) -> tuple[Part, ...]:
    """Return a question and its answer in the row's frame."""
    if is_chat:
        return _render_chat(rng, ask)
    style = rng.random()
    if style < 0.6 or not ask.prefix:
        before, behind = rng.choices(RAW_FRAMES, RAW_WEIGHTS)[0]
        return ((before.format(ask.question), Kind.TEXT), (behind.format(ask.value), Kind.ANSWER))
    begin = ask.prefix if style > 0.8 and ask.is_said else f"{ask.question} {ask.prefix}"
    return ((begin, Kind.TEXT), (f" {ask.value}.\n", Kind.ANSWER))


def _render_chat(rng: random.Random, ask: Ask) -> tuple[Part, ...]:
    start = f"{IM_END}\n{IM_START}assistant\n"
    if rng.random() < 0.7 or not ask.prefix:
        suffix = rng.choices(SUFFIXES, SUFFIX_WEIGHTS)[0].replace("{n}", ask.noun)
        return ((f"{ask.question} {suffix}{start}", Kind.TEXT),
                (f"{ask.value}{IM_END}", Kind.ANSWER))
    space = " " if rng.random() < 0.15 else ""
    return (
        (f"{ask.question}{start}", Kind.TEXT), (f"{space}{ask.prefix} ", Kind.COPY),
        (f"{ask.value}.{IM_END}", Kind.ANSWER))
