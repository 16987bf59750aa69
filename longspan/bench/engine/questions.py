"""Prompts for `longspan bench quality`: one question at the end, or many of them in one prompt."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import LongspanError
from longspan.eval.prompt import Frame, Materials, bury_in_prose
from longspan.eval.task import Example
from longspan.eval.tasks.passkey import (
    INSTRUCTION,
    NEEDLE,
    QUESTION,
    passkey_haystack,
    spread_depths,
)
from longspan.eval.text import Encoder, TextBank
from longspan.eval.words import ADJECTIVES, NOUNS, draw_keys, draw_number

Place = Literal["end", "spread", "negatives", "far"]
BOTH = ("What are all the special magic numbers for {first} and {second} mentioned in the provided "
        "text?")
INSTRUCTION_BOTH = "Answer with the numbers only."
TOKENS_PER_TURN = 64
"""Room for a question and its answer; prompts with many of them come out a little short."""


@dataclass(frozen=True, slots=True)
class Quiz:
    """A prompt whose answers are known, for teacher forcing."""

    ids: array[int]
    """Prompt, and where there are several questions the answers between them."""
    answers: tuple[tuple[int, tuple[int, ...]], ...]
    """(position of the first token, tokens) of each answer. The one of a single question stands
    right behind ``ids``."""

    @property
    def prompt_len(self) -> int:
        """Tokens to prefill."""
        return len(self.ids)


def single_questions(
    bank: TextBank, tokenizer: Tokenizer, num_tokens: int, count: int, rng: random.Random
) -> list[Quiz]:
    """Build prompts about one document, each with one question at its end; all equally long."""
    examples = passkey_haystack(
        bank, tokenizer, num_tokens=num_tokens, depths=spread_depths(count, rng), rng=rng)
    return [Quiz(example.prompt_ids, ((num_tokens, _answer(tokenizer, example)),))
            for example in examples]


def many_questions(
    bank: TextBank, tokenizer: Tokenizer, num_tokens: int, count: int, rng: random.Random, *,
    place: Place = "end",
) -> Quiz:
    """Build one prompt of at most ``num_tokens`` with ``count`` questions about its document, each
    but the last answered: the conversation as it would have gone, last answer included.

    Args:
        place: ``end``: the questions stand one after the other behind the document. Else it is the
            prompt's first quarter, and more text stands before every question but the first, so
            that they are spread over the rest. ``negatives``: beside each fact stand two whose keys
            share a word with its own. ``far``: each question asks for two facts, one from either
            half of the document.
    """
    room = num_tokens - TOKENS_PER_TURN * (2 if place == "far" else 1) * (count - 1)
    document_len = room if place == "end" else room // 4
    filler_len = (room - document_len) // max(1, count - 1)
    first, asked = _opening(bank, tokenizer, document_len, count, rng, place)
    after = Frame.chat(tokenizer).after
    between = _between_turns(tokenizer)
    filler = [int(token) for piece in bank.take(rng, filler_len * count) for token in piece.ids]
    ids = array("i", first)
    answers = []
    for index, (question, values) in enumerate(asked):
        if index:
            ids.extend(tokenizer.encode(between))
            if filler_len:
                ids.extend(filler[index * filler_len : (index + 1) * filler_len])
            ids.extend(tokenizer.encode(f"{question}{after}"))
        for number, value in enumerate(values):
            if number:
                ids.extend(tokenizer.encode(" and "))
            answer = tuple(tokenizer.encode(value))
            answers.append((len(ids), answer))
            ids.extend(answer)
    if len(ids) > num_tokens:
        raise LongspanError(f"{count} questions and answers take "
                            f"{len(ids) - document_len - filler_len * (count - 1)} tokens, "
                            f"{num_tokens - room} are set aside; ask fewer")
    return Quiz(ids, tuple(answers))


Asked = tuple[str, tuple[str, ...]]
"""A question, and the values that answer it, in order."""


def _opening(
    bank: TextBank, tokenizer: Tokenizer, num_tokens: int, count: int, rng: random.Random,
    place: Place,
) -> tuple[Sequence[int], list[Asked]]:
    """Return the document's ids, the first question behind it, and all questions."""
    if place in ("end", "spread"):
        examples = passkey_haystack(
            bank, tokenizer, num_tokens=num_tokens, depths=spread_depths(count, rng), rng=rng)
        rng.shuffle(examples)
        return examples[0].prompt_ids, [
            (f"{example.question} {INSTRUCTION}", (example.answer,)) for example in examples]
    keys = draw_keys(rng, 2 * count if place == "far" else count)
    values = {key: draw_number(rng) for key in keys}
    depths = spread_depths(len(keys), rng)
    facts = list(zip(depths, keys, strict=True))
    asked: list[Asked]
    if place == "far":
        halves = keys[:count], rng.sample(keys[count:], count)
        asked = [(f"{BOTH.format(first=one, second=other)} {INSTRUCTION_BOTH}",
                  (values[one], values[other])) for one, other in zip(*halves, strict=True)]
    else:
        asked = [(f"{QUESTION.format(key=key)} {INSTRUCTION}", (values[key],)) for key in keys]
        for other in draw_negatives(keys, rng):
            values[other] = draw_number(rng)
            facts.append((rng.random(), other))
    rng.shuffle(asked)
    materials = Materials(encoder=Encoder(tokenizer), bank=bank, frame=Frame.chat(tokenizer))
    tail = materials.frame.tail(f"\n\n{asked[0][0]}")
    document = bury_in_prose(
        materials, head="", num_tokens=num_tokens, rng=rng,
        num_tail_tokens=materials.encoder.count(tail),
        facts=[(depth, NEEDLE.format(key=key, value=values[key])) for depth, key in facts])
    return document.finish(materials, tail, num_tokens).ids, asked


def draw_negatives(keys: Sequence[str], rng: random.Random) -> list[str]:
    """Draw two keys for each: one with its adjective, one with its noun, all of them new."""
    found = dict.fromkeys(keys)
    for key in keys:
        adjective, noun = key.split("-")
        for draw in (lambda adjective=adjective: f"{adjective}-{rng.choice(NOUNS)}",
                     lambda noun=noun: f"{rng.choice(ADJECTIVES)}-{noun}"):
            while (other := draw()) in found:
                pass
            found[other] = None
    return list(found)[len(keys):]


def _answer(tokenizer: Tokenizer, example: Example) -> tuple[int, ...]:
    return tuple(tokenizer.encode(example.answer))


def _between_turns(tokenizer: Tokenizer) -> str:
    """Return what the chat template puts between an answer and the next question."""
    marks = "FIRST-ANSWER-MARK", "NEXT-QUESTION-MARK"
    text = tokenizer.render_chat([
        {"role": "user", "content": "x"}, {"role": "assistant", "content": marks[0]},
        {"role": "user", "content": marks[1]}])
    _, has_answer, rest = text.partition(marks[0])
    between, has_question, _ = rest.partition(marks[1])
    if not (has_answer and has_question):
        raise LongspanError("the chat template leaves an answer or a second question out")
    return between
