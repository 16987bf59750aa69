"""Passkey haystacks: exact lengths, facts where they should be, fair scoring."""

from __future__ import annotations

import random
import re

import pytest

from longspan.errors import LongspanError
from longspan.eval.task import Example
from longspan.eval.tasks.passkey import passkey_haystack, score_number, spread_depths
from longspan.eval.text import TextBank
from tests.eval.conftest import ChatTokenizer

NEEDLE = r"^One of the special magic numbers for (\S+) is: (\d{7})\.$"


def build(bank: TextBank, tokenizer: ChatTokenizer, num_tokens: int, seed: int = 0,
          depths: tuple[float, ...] = (0.0, 0.3, 0.7, 1.0)) -> list[Example]:
    return passkey_haystack(bank, tokenizer, num_tokens=num_tokens, depths=depths,
                            rng=random.Random(seed), num_distractors=3)


@pytest.mark.parametrize("num_tokens", [700, 1000, 1001, 1002, 1003, 4096, 20_000, 131_072])
def test_prompts_are_exact_and_are_the_tokens_of_their_text(
    bank: TextBank, tokenizer: ChatTokenizer, num_tokens: int
) -> None:
    for seed in range(3):
        for example in build(bank, tokenizer, num_tokens, seed):
            assert len(example.prompt_ids) == num_tokens
            text = tokenizer.decode(example.prompt_ids)
            assert tokenizer.encode(text) == list(example.prompt_ids)


def test_every_fact_is_in_the_text_once_on_a_line_of_its_own(
    bank: TextBank, tokenizer: ChatTokenizer
) -> None:
    examples = build(bank, tokenizer, 4096)
    for example in examples:
        text = tokenizer.decode(example.prompt_ids)
        facts = dict(re.findall(NEEDLE, text, re.MULTILINE))
        assert len(facts) == 7
        (key,) = [key for key in facts if f" {key} " in example.question]
        assert facts[key] == example.answer and text.count(example.answer) == 1
        assert text.endswith(f"\n\n{example.question} Answer with the number only."
                             "<|im_end|>\n<|im_start|>assistant\n")
    assert len({example.answer for example in examples}) == len(examples)


def test_facts_stand_at_their_depth(bank: TextBank, tokenizer: ChatTokenizer) -> None:
    depths = (0.9, 0.1, 0.5)
    for depth, example in zip(depths, build(bank, tokenizer, 20_000, depths=depths), strict=True):
        assert example.depth == pytest.approx(depth, abs=0.02)
        at = tokenizer.decode(example.prompt_ids[example.position:example.position + 40])
        assert at.startswith("One of the special magic numbers") and example.answer in at


def test_questions_share_everything_but_their_end(
    bank: TextBank, tokenizer: ChatTokenizer
) -> None:
    examples = build(bank, tokenizer, 4096)
    assert len({tuple(example.prompt_ids[:4000]) for example in examples}) == 1


def test_the_seed_decides(bank: TextBank, tokenizer: ChatTokenizer) -> None:
    first, again, other = (build(bank, tokenizer, 1000, seed) for seed in (1, 1, 2))
    assert [e.prompt_ids for e in first] == [e.prompt_ids for e in again]
    assert first[0].prompt_ids != other[0].prompt_ids


def test_too_short_for_the_facts(bank: TextBank, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(LongspanError, match=r"prompt of 300 tokens is too short for 7 facts; "
                                            r"at least (\d+) tokens") as caught:
        build(bank, tokenizer, 300)
    least = int(re.findall(r"at least (\d+)", str(caught.value))[0])
    assert len(build(bank, tokenizer, least)[0].prompt_ids) == least


def test_too_many_questions(bank: TextBank, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(LongspanError, match="5000 questions on one document"):
        passkey_haystack(bank, tokenizer, num_tokens=4096, depths=[0.5] * 5000,
                         rng=random.Random(0))


def test_depths_cover_the_document() -> None:
    depths = spread_depths(10, random.Random(0))
    assert [int(10 * depth) for depth in depths] == list(range(10))


@pytest.mark.parametrize(("text", "score"), [
    ("1234567", 1.0), (" 1234567.", 1.0), ("The number is 1234567, not 7654321", 1.0),
    ("7654321 or 1234567", 0.0), ("12345678", 0.0), ("123456", 0.0), ("none", 0.0), ("", 0.0)])
def test_the_first_number_counts(text: str, score: float) -> None:
    assert score_number(text, "1234567") == score
