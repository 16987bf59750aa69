"""Prompts for `longspan bench quality`: one question at the end, or many of them one by one."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass

from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import LongspanError
from longspan.eval.prompt import Frame
from longspan.eval.task import Example
from longspan.eval.tasks.passkey import INSTRUCTION, passkey_haystack, spread_depths
from longspan.eval.text import TextBank

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
    spread: bool = False,
) -> Quiz:
    """Build one prompt of at most ``num_tokens`` with ``count`` questions about its document at the
    end, each but the last answered: the conversation as it would have gone, last answer included.

    Args:
        spread: the document is the prompt's first quarter, and more text stands before every
            question but the first, so that they are spread over the rest.
    """
    room = num_tokens - TOKENS_PER_TURN * (count - 1)
    document_len = room // 4 if spread else room
    filler_len = (room - document_len) // max(1, count - 1)
    examples = passkey_haystack(
        bank, tokenizer, num_tokens=document_len, depths=spread_depths(count, rng), rng=rng)
    rng.shuffle(examples)
    after = Frame.chat(tokenizer).after
    between = _between_turns(tokenizer)
    filler = [int(token) for piece in bank.take(rng, filler_len * count) for token in piece.ids]
    ids = array("i", examples[0].prompt_ids)
    answers = []
    for index, example in enumerate(examples):
        if index:
            ids.extend(tokenizer.encode(between))
            if filler_len:
                ids.extend(filler[index * filler_len : (index + 1) * filler_len])
            ids.extend(tokenizer.encode(f"{example.question} {INSTRUCTION}{after}"))
        answer = _answer(tokenizer, example)
        answers.append((len(ids), answer))
        ids.extend(answer)
    if len(ids) > num_tokens:
        raise LongspanError(f"{count} questions and answers take "
                            f"{len(ids) - document_len - filler_len * (count - 1)} tokens, "
                            f"{num_tokens - room} are set aside; ask fewer")
    return Quiz(ids, tuple(answers))


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
