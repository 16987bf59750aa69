"""The report's tasks: every answer can be rebuilt from the document."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from longspan.data.compose import Source
from longspan.data.tasks import (
    Sample,
    copy_span,
    draw_task,
    fill_in_the_middle,
    keywords_to_paragraph,
    paragraph_at_position,
    reorder_paragraphs,
    split_paragraphs,
)


@pytest.fixture
def paragraphs(source: Source) -> list[np.ndarray]:
    ids = source.corpus.stream(random.Random(2), 900, source.table)
    return split_paragraphs(random.Random(3), ids, source.table)


def decode(source: Source, ids: np.ndarray) -> str:
    return str(source.table.tokenizer.decode(ids.tolist(), skip_special_tokens=False))


def parts(source: Source, sample: Sample) -> tuple[str, str]:
    """Text before the answer, and the answer."""
    start, stop = sample.answer_span
    return decode(source, sample.piece.ids[:start]), decode(source, sample.piece.ids[start:stop])


def test_paragraphs_are_a_contiguous_cut(source: Source) -> None:
    ids = source.corpus.stream(random.Random(2), 900, source.table)
    cut = np.concatenate(split_paragraphs(random.Random(3), ids, source.table))
    text = decode(source, ids)
    assert decode(source, cut) in text
    assert len(cut) > 600


@pytest.mark.parametrize("seed", range(6))
def test_fim_is_invertible(source: Source, paragraphs: list[np.ndarray], seed: int) -> None:
    sample = fill_in_the_middle(random.Random(seed), paragraphs, source.table)
    before, middle = parts(source, sample)
    pieces = dict(re.findall(r"### (Prefix|Suffix)\n(.*?)(?=### (?:Prefix|Suffix|Middle)\n)",
                             before, re.S))
    whole = "".join(decode(source, p) for p in paragraphs)
    assert pieces["Prefix"] + middle + pieces["Suffix"] == whole


def test_keywords_are_in_the_answer(source: Source, paragraphs: list[np.ndarray]) -> None:
    before, answer = parts(
        source, keywords_to_paragraph(random.Random(1), paragraphs, source.table))
    words = re.search(r"keywords (.*)\?", before)
    assert words is not None
    assert all(word in answer for word in words[1].split(", "))
    assert answer in before


@pytest.mark.parametrize("seed", range(6))
def test_position_answers_the_neighbour(
    source: Source, paragraphs: list[np.ndarray], seed: int
) -> None:
    sample = paragraph_at_position(random.Random(seed), paragraphs, source.table)
    before, answer = parts(source, sample)
    found = re.search(r"### Which paragraph comes (\w+) this one\?\n(.*)### Answer", before, re.S)
    assert found is not None
    pair = answer + found[2] if found[1] == "before" else found[2] + answer
    assert pair in before


def test_reorder_is_invertible(source: Source, paragraphs: list[np.ndarray]) -> None:
    sample = reorder_paragraphs(random.Random(1), paragraphs, source.table)
    before, answer = parts(source, sample)
    shuffled = re.split(r"### (?:Part \d+|Original order)\n", before)[1:-1]
    restored = "".join(shuffled[int(n) - 1] for n in answer.split())
    assert restored == "".join(decode(source, p) for p in paragraphs)


def test_copy_repeats_the_marked_span(source: Source, paragraphs: list[np.ndarray]) -> None:
    before, answer = parts(source, copy_span(random.Random(4), paragraphs, source.table))
    marked = re.search(r"### Begin (\d+)\n(.*)### Stop \1\n", before, re.S)
    assert marked is not None and marked[2] == answer


def test_all_tasks_are_drawn(source: Source, paragraphs: list[np.ndarray]) -> None:
    rng = random.Random(0)
    names = {draw_task(rng, paragraphs, source.table).task for _ in range(60)}
    assert names == {"fim", "keywords", "position", "reorder", "copy"}
