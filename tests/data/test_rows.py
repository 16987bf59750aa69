"""Rows: exact length, determinism, canonical tokens, facts before their questions."""

from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest

from longspan.data.facts import draw_group
from longspan.data.gate_documents import gate_documents
from longspan.data.layout import lay_out
from longspan.data.plan import draw_plan
from longspan.data.questions import REFUSALS, ask_list, ask_one, ask_values, render
from longspan.data.rows import Mixture, compose_batch, compose_row
from longspan.data.source import Source
from longspan.data.tasks import TASKS
from longspan.data.tokens import IM_END, Kind, Piece
from longspan.data.vocabulary import Words

LENGTHS = (512, 1024, 4096)
RETRIEVAL = {"needle": 1, "multi_query": 1, "multi_value": 1}


def text_of(source: Source, piece: Piece) -> str:
    return str(source.table.tokenizer.decode(piece.ids.tolist(), skip_special_tokens=False))


def runs(piece: Piece, kind: Kind) -> list[tuple[int, int]]:
    """Maximal token ranges of a kind."""
    edges = np.diff(np.concatenate([[0], (piece.kinds == kind).astype(int), [0]]))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


@pytest.mark.parametrize("length", LENGTHS)
def test_length_is_exact_and_the_seed_decides(source: Source, length: int) -> None:
    for i in range(6):
        row = compose_row((3, i), source, length).piece
        again = compose_row((3, i), source, length).piece
        assert len(row.ids) == len(row.kinds) == length
        assert (row.ids == again.ids).all() and (row.kinds == again.kinds).all()
    assert (
        compose_row((3, 0), source, length).piece.ids
        != compose_row((4, 0), source, length).piece.ids).any()


def test_every_answer_was_planted_before(source: Source) -> None:
    mixture = Mixture(weights=RETRIEVAL, packed=0.0)
    refusals = {said.replace("{n}", noun) for said in REFUSALS
                for noun in ("number", "uuid", "word", "value")}
    total = 0
    for i in range(12):
        row = compose_row((5, i), source, 2048, mixture).piece
        for start, stop in runs(row, Kind.ANSWER):
            answer = text_of(source, Piece(row.ids[start:stop], row.kinds[start:stop]))
            before = text_of(source, Piece(row.ids[:start], row.kinds[:start]))
            if answer.removesuffix(IM_END).strip() in refusals:
                continue
            values = re.findall(r"[0-9a-z-]{4,}", answer.replace(IM_END, ""))
            assert [value for value in values if value not in before] == []
            total += len(values)
    assert total > 60


def test_tokens_are_those_of_the_whole_text(source: Source) -> None:
    """From the first line of text on. The one before is cut to give the row its length: with the
    head of the row, its first token may be another one than the tokenizer would choose."""
    end = source.table.tokenizer.token_to_id("<|endoftext|>")
    compared = 0
    for i in range(60):
        row = compose_row((6, i), source, 1024).piece
        borders = [0, *(np.flatnonzero(row.ids == end) + 1), len(row.ids)]
        for start, stop in itertools.pairwise(borders):
            ids = row.ids[start:stop]
            texts = np.flatnonzero(row.kinds[start:stop] == Kind.FILLER)
            lines = source.table.line_starts(ids) if len(ids) > 2 else []
            first = next((p for p in lines if p > texts[0]), stop) if len(texts) else 0
            text = source.table.tokenizer.decode(ids[first:].tolist(), skip_special_tokens=False)
            again = source.table.tokenizer.encode(text, add_special_tokens=False).ids
            assert again == ids[first:].tolist()
            compared += len(again)
    assert compared > 0.9 * 60 * 1024


def test_questions_follow_their_facts(source: Source) -> None:
    rng = random.Random(1)
    checked = 0
    for _ in range(20):
        plan = draw_plan(rng, source, 6, 2048)
        sample = lay_out(rng, source, plan, 2048)
        if sample is None:
            continue
        text = text_of(source, sample.piece)
        for question in plan.questions:
            if question.after >= 0:
                fact = plan.facts[question.after]
                asked = text.rfind("".join(part for part, _ in question.parts))
                assert 0 <= text.find(fact.text) < asked
                checked += 1
    assert checked > 20


def test_chat_rows_have_the_evaluation_form(source: Source) -> None:
    form = re.compile(
        r"[^\n]\n\nWhat is the special magic number for [^?]+ mentioned in the provided text\? "
        r"Answer with the number only\.<\|im_end\|>\n<\|im_start\|>assistant\n\d+<\|im_end\|>")
    needle = Mixture(weights={"needle": 1}, packed=0.0)
    rows = [compose_row((7, i), source, 2048, needle).piece for i in range(60)]
    hits = [form.search(text_of(source, row)) for row in rows]
    assert sum(h is not None for h in hits) >= 6


def test_batch_rows_are_the_single_rows(source: Source) -> None:
    ids, kinds = compose_batch((1, 2), source, 3, 256)
    assert ids.shape == kinds.shape == (3, 256)
    assert (ids[1] == compose_row((1, 2, 1), source, 256).piece.ids).all()


def test_too_short_rows_are_refused(source: Source) -> None:
    with pytest.raises(ValueError, match="below 128"):
        compose_row((0,), source, 64)


@pytest.mark.parametrize("number_first", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_probe_is_canonical_and_asks_what_it_holds(
    source: Source, index: int, number_first: bool
) -> None:
    document, questions = list(
        gate_documents(source, 2048, 2, 8, number_first=number_first))[index]
    tokenizer = source.table.tokenizer
    held = tokenizer.decode(document)
    assert len(questions) == 8
    for question, answer in questions:
        ids = [*document, *question, *answer]
        assert len(ids) <= 2048
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        value = tokenizer.decode(answer)
        assert held.count(value) == 1
        assert (f"is: {value}." in held) is not number_first
        assert text.endswith(f"number only.<|im_end|>\n<|im_start|>assistant\n{value}<|im_end|>")


@pytest.mark.parametrize("name", sorted(TASKS))
@pytest.mark.parametrize("length", [700, 3000])
def test_a_row_is_of_one_task_and_knows_its_answers(
    source: Source, name: str, length: int
) -> None:
    for i in range(3):
        row = compose_row((8, i), source, length, Mixture(weights={name: 1}, packed=0.0))
        assert row.task == name and len(row.piece) == length
        assert bool(row.answers) == (name != "plain")
        for answer in row.answers:
            kinds = set(row.piece.kinds[answer.start : answer.stop].tolist())
            assert kinds <= {Kind.ANSWER, Kind.COPY, Kind.TEXT} and kinds
            assert 0 <= answer.distance <= answer.start < answer.stop <= length


def test_packs_hold_several_tasks(source: Source) -> None:
    row = compose_row((9, 0), source, 4096, Mixture(packed=1.0))
    end = source.table.end
    assert row.task == "packed" and (row.piece.ids == end).sum() >= 3
    starts = [answer.start for answer in row.answers]
    assert starts == sorted(starts) and len(starts) > 4


@pytest.mark.parametrize(("weights", "message"), [
    ({"nothing": 1.0}, "no task named nothing: choose from fim"),
    ({"fim": 0.0}, "the weights of tasks"), ({"fim": 2.0, "copy": -1.0}, "the weights of tasks")])
def test_mixtures_that_are_none(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(weights=weights)


def test_a_probe_of_text_without_lines(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts begin lines of their own, and the document is not longer for it."""
    stream = source.corpus.stream
    words = source.table.tokenizer.encode(" word and word", add_special_tokens=False).ids
    monkeypatch.setattr(type(source.corpus), "stream", lambda self, rng, count, table: np.resize(
        np.array(words, np.uint32), len(stream(rng, count, table))))
    for document, questions in gate_documents(source, 2048, 2, 8):
        lines = source.table.tokenizer.decode(document).splitlines()
        for question, answer in questions:
            assert len(document) + len(question) + len(answer) <= 2048
            value = source.table.tokenizer.decode(answer)
            assert sum(line.endswith(f"is: {value}.") and line.startswith("One of")
                       for line in lines) == 1


def test_every_question_names_what_it_asks_for(source: Source) -> None:
    """Also where only the beginning of the answer's sentence stands: "It is" asks for nothing."""
    rng = random.Random(0)
    words = Words.draw(rng, source.corpus.words, 64, hard=False)
    for _ in range(600):
        group = draw_group(rng, woven=lambda rng: "they {v} saw {k} there")
        facts = [group.make(rng, words, set()) for _ in range(2)]
        for ask, named in ((ask_one(rng, source, facts[0]), facts[:1]),
                           (ask_values(rng, source, facts[:1] * 2), facts[:1]),
                           (ask_list(rng, source, facts), facts)):
            question = "".join(text for text, kind in render(rng, rng.random() < 0.3, ask)
                               if kind != Kind.ANSWER)
            assert all(fact.key in question for fact in named), question


def test_long_rows_have_no_recall(source: Source) -> None:
    """Unless nothing else is asked for."""
    mixture = Mixture(weights={"recall": 3, "plain": 1}, packed=0.0)
    names = {length: {compose_row((i,), source, length, mixture).task for i in range(12)}
             for length in (1024, 16_384)}
    assert names == {1024: {"recall", "plain"}, 16_384: {"plain"}}
    alone = Mixture(weights={"recall": 1}, packed=0.0)
    assert compose_row((1,), source, 16_384, alone).task == "recall"
