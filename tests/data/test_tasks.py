"""The tasks: every answer follows from the text before it, at the distance that is stated."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer

from longspan.data.draft import Answer, Sample
from longspan.data.facts import NATURAL, draw_group
from longspan.data.plan import draw_plan
from longspan.data.questions import REFUSALS, ask_one
from longspan.data.source import Source
from longspan.data.tasks import DOCUMENT_TASKS, TASKS
from longspan.data.tasks.keywords import rare_words
from longspan.data.tasks.needles import FOCI
from longspan.data.tasks.paragraphs import split_evenly, split_paragraphs
from longspan.data.tasks.position import ASKS
from longspan.data.tasks.variables import _interleave
from longspan.data.tokens import IM_END, Kind, TokenTable
from longspan.data.vocabulary import Words
from longspan.data.woven import draw_template, draw_words

SEEDS = range(6)


def draw(name: str, source: Source, seed: int, room: int = 900) -> Sample:
    """A sample of a task, from the first draws that give one."""
    rng = random.Random(seed)
    for _ in range(20):
        sample = TASKS[name](rng, source, room)
        if sample is not None:
            assert len(sample.piece) <= room
            return sample
    raise AssertionError(f"{name} gives no sample")


def text_of(source: Source, sample: Sample, start: int, stop: int) -> str:
    return source.table.text(sample.piece.ids[start:stop])


def answer_text(source: Source, sample: Sample, answer: Answer) -> str:
    return text_of(source, sample, answer.start, answer.stop)


@pytest.mark.parametrize("with_lines", [True, False])
def test_cuts_lose_nothing(source: Source, with_lines: bool) -> None:
    ids = source.corpus.stream(random.Random(2), 900, source.table)
    if not with_lines:
        text = source.table.text(ids).replace("\n", " ")
        ids = np.array(source.table.tokenizer.encode(text).ids)
    paragraphs = split_paragraphs(random.Random(3), ids, source.table)
    assert (np.concatenate(paragraphs) == ids).all()
    assert all(20 <= len(p) <= 400 for p in paragraphs) and len(paragraphs) > 4
    parts = split_evenly(ids, 10, source.table)
    assert (np.concatenate(parts) == ids).all() and 8 <= len(parts) <= 10
    assert max(map(len, parts)) < 3 * len(ids) / len(parts)


@pytest.mark.parametrize("seed", SEEDS)
def test_fim_is_invertible(source: Source, seed: int) -> None:
    sample = draw("fim", source, seed)
    answer, = sample.answers
    middle = answer_text(source, sample, answer)
    kinds = sample.piece.kinds[: answer.start] == Kind.FILLER
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kinds, [False]])))
    first, second = (text_of(source, sample, a, b)
                     for a, b in zip(edges[::2], edges[1::2], strict=True))
    everything = source.table.text(source.corpus.tokens)
    orders = [first + middle + second, second + middle + first]
    assert any(order in everything for order in orders)
    borders = (edges[1], edges[2]) if orders[0] in everything else (edges[3], edges[0])
    assert answer.start - answer.distance == min(borders)


def test_fim_uses_the_control_tokens_of_the_tokenizer(source: Source) -> None:
    tokenizer = Tokenizer.from_str(source.table.tokenizer.to_str())
    tokenizer.add_special_tokens(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    own = replace(source, table=TokenTable(tokenizer))
    texts = [text_of(own, s, 0, len(s.piece)) for s in (draw("fim", own, i) for i in range(12))]
    found = [text for text in texts if "<|fim_prefix|>" in text]
    assert 2 < len(found) < 12
    for text in found:
        assert re.fullmatch(r"(<\|fim_(prefix|suffix)\|>[^|]*){2}<\|fim_middle\|>.*<\|endoftext\|>",
                            text, re.S)


@pytest.mark.parametrize("seed", SEEDS)
def test_keywords_are_in_their_paragraph_alone(source: Source, seed: int) -> None:
    sample = draw("keywords", source, seed)
    document = text_of(source, sample, 0, sample.answers[0].start)
    for answer in sample.answers:
        ask = text_of(source, sample, 0, answer.start).rstrip("\n").split("\n")[-1]
        text = answer_text(source, sample, answer)
        asked = [word for word in re.findall(r"[a-z]{4,12}", ask) if word in text]
        assert asked and text.rstrip("\n") in document
        assert text_of(source, sample, answer.start - answer.distance,
                       answer.stop - answer.distance) == text


def test_rare_words_are_in_one_text() -> None:
    assert rare_words(["apple banana common", "cherry common", "Common Apple only"]) == [
        ["banana"], ["cherry"], ["only"]]


@pytest.mark.parametrize("seed", SEEDS)
def test_position_answers_stand_where_they_say(source: Source, seed: int) -> None:
    sample = draw("position", source, seed)
    for answer in sample.answers:
        begin = answer.start - answer.distance
        assert text_of(source, sample, begin, begin + answer.stop - answer.start) \
            == answer_text(source, sample, answer)


def test_position_means_before_and_after(source: Source) -> None:
    found = Counter[int]()
    for seed in range(30):
        sample = draw("position", source, seed)
        before = text_of(source, sample, 0, sample.answers[0].start)
        asked = [(ask, side) for pair in ASKS for side, ask in enumerate(pair) if ask in before]
        if asked:
            ask, side = max(asked, key=lambda pair: before.rfind(pair[0]))
            document, quoted = before.split(ask)[0], before.split(ask)[1].split("\n", 1)[1]
            text = answer_text(source, sample, sample.answers[0])
            place, other = document.find(text.rstrip("\n")), document.find(quoted[:60])
            assert place >= 0 and other >= 0
            assert (place > other) == side
            found[side] += 1
    assert min(found[0], found[1]) > 5


@pytest.mark.parametrize("seed", range(10))
def test_reorder_is_invertible(source: Source, seed: int) -> None:
    sample = draw("reorder", source, seed)
    kinds = sample.piece.kinds[: sample.answers[0].start] == Kind.FILLER
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kinds, [False]])))
    parts = [text_of(source, sample, a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    everything = source.table.text(source.corpus.tokens)
    if len(sample.answers) > 1:
        restored = "".join(answer_text(source, sample, answer) for answer in sample.answers)
    else:
        numbers = answer_text(source, sample, sample.answers[0]).split()
        assert sorted(map(int, numbers)) == list(range(1, len(parts) + 1))
        restored = "".join(parts[int(n) - 1] for n in numbers)
    assert len(restored) > 100 and restored in everything
    assert parts != sorted(parts, key=everything.find) or len(parts) < 6


def test_reordering_fills_the_row(source: Source) -> None:
    lengths = [len(draw("reorder", source, seed, 4000).piece) for seed in range(8)]
    assert np.median(lengths) > 3000


def test_copy_repeats_the_marked_span(source: Source) -> None:
    for seed in SEEDS:
        sample = draw("copy", source, seed)
        answer, = sample.answers
        begin = answer.start - answer.distance
        assert text_of(source, sample, begin, begin + answer.stop - answer.start) \
            == answer_text(source, sample, answer)


@pytest.mark.parametrize("name", sorted(FOCI))
def test_planted_facts_are_at_their_distance(source: Source, name: str) -> None:
    """From the first fact on all that is asked for is there; what is absent is nowhere."""
    num_absent = num_answers = 0
    for seed in range(8):
        sample = draw(name, source, seed, 2048)
        for answer in sample.answers:
            text = answer_text(source, sample, answer).replace(IM_END, "").strip().rstrip(".")
            before = text_of(source, sample, 0, answer.start)
            num_answers += 1
            if answer.distance == 0:
                num_absent += 1
                assert re.sub("number|uuid|word", "{n}", text) + "." in REFUSALS
                continue
            values = re.split(r", and | and |, ", text)
            places = [before.find(value) for value in values]
            assert -1 not in places
            evidence = text_of(source, sample, answer.start - answer.distance, answer.start)
            assert all(value in evidence for value in values)
    shares = {"absent": (0.35, 0.65), "key_value": (0.02, 0.25)}.get(name, (0.0, 0.15))
    assert shares[0] <= num_absent / num_answers <= shares[1]


def test_lists_are_asked_for_where_they_shall(source: Source) -> None:
    for name in ("multi_query", "multi_value"):
        num_lists = num_answers = 0
        for seed in range(8):
            sample = draw(name, source, seed, 2048)
            texts = [answer_text(source, sample, answer) for answer in sample.answers]
            num_lists += sum(" and " in text for text in texts)
            num_answers += len(texts)
        assert num_lists > 0.4 * num_answers, name


def test_absent_keys_are_absent(source: Source) -> None:
    checked = 0
    for seed in range(8):
        sample = draw("absent", source, seed, 2048)
        ends = [0, *(answer.start for answer in sample.answers)]
        for answer in (a for a in sample.answers if a.distance == 0):
            before = max(end for end in ends if end < answer.start)
            question = text_of(source, sample, before, answer.start)[-200:]
            keys = re.findall(r"(?:value of|number for|number of|uuid for) ([\w-]+)", question)
            text = text_of(source, sample, 0, answer.start)[:-len(question)]
            planted = re.findall(r"(?:for|of) ([\w-]+) is:? ", text)
            checked += len(keys)
            assert not keys or keys[-1] not in planted
    assert checked > 5


def test_chains_of_variables_lead_to_their_value(source: Source) -> None:
    for seed in range(12):
        sample = draw("variables", source, seed, 1500)
        assert len(sample.answers) in (2, 4, 6, 8)
        text = text_of(source, sample, 0, len(sample.piece))
        values: dict[str, str] = {}
        pattern = (r"(?:VAR |let |set |The value of )?(\w+)"
                   r"(?: = | := | to | is | has the same value as )"
                   r"(?:VAR )?([A-Z]{5}|[a-z]+|\d{5})[;.]?\n")
        for name, right in re.findall(pattern, text):
            if right.isdigit() or right in values:
                values.setdefault(name, values.get(right, right))
        for answer in sample.answers:
            given = answer_text(source, sample, answer).replace(IM_END, "").strip().rstrip(".")
            if given.isdigit():
                assert given in values.values()
            else:
                names = given.split()
                assert len(names) >= 2
                assert {values[name] for name in names} == {values[names[0]]}
                assert [n for n in values if values[n] == values[names[0]]] == names


def test_chains_keep_their_order() -> None:
    steps = _interleave(random.Random(1), [3, 2])
    assert sorted(steps) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [s for c, s in steps if c == 0] == [0, 1, 2]


def test_counts_are_right(source: Source) -> None:
    checked = 0
    for seed in range(12):
        sample = draw("counting", source, seed, 900)
        listed = sample.piece.ids[sample.piece.kinds == Kind.FILLER]
        counts = Counter(source.table.text(listed).split())
        first, second = (answer_text(source, sample, answer).replace(IM_END, "").strip(" .\n")
                         for answer in sample.answers)
        best = re.split(r", and | and |, ", first)
        least = min(counts[word] for word in best)
        assert all(count < least for word, count in counts.items() if word not in best)
        assert int(second) in counts.values()
        checked += len(best)
    assert checked > 20


def test_held_out_rows_have_wordings_of_their_own(source: Source) -> None:
    options = [f"w{i}" for i in range(10)]
    train, held_out = (replace(source, is_held_out=out).wordings(options) for out in (False, True))
    assert len(train) == 8 and len(held_out) == 2 and not set(train) & set(held_out)
    assert source.wordings(options[:4]) == options[:4]


def test_document_tasks_read_whole_documents(source: Source) -> None:
    longest = int(source.corpus.lengths[-1])
    alone = replace(source, may_join=False)
    rng = random.Random(0)
    assert {len(alone.document(rng, longest + 50)) for _ in range(5)} <= set(source.corpus.lengths)
    assert len(source.document(rng, 4 * longest)) == 4 * longest
    assert len(alone.document(rng, 4 * longest)) == longest


@pytest.mark.parametrize("name", [*DOCUMENT_TASKS, *FOCI, "variables", "counting"])
def test_tasks_without_chatml_have_no_chat(source: Source, name: str) -> None:
    tokenizer = Tokenizer.from_str(source.table.tokenizer.to_str().replace("<|im_", "<|am_"))
    own = replace(source, table=TokenTable(tokenizer))
    texts = [text_of(own, s, 0, len(s.piece)) for s in (draw(name, own, i) for i in range(5))]
    assert not any("im_end" in text or "im_start" in text for text in texts)


def test_held_out_facts_are_of_wordings_that_no_training_row_has(source: Source) -> None:
    """Sentences of facts, and forms of questions, by what is left when keys and values are gone."""
    seen: dict[bool, set[str]] = {}
    for held_out in (False, True):
        own = replace(source, is_held_out=held_out)
        groups = [draw_group(random.Random(i), "natural", own.wordings) for i in range(400)]
        seen[held_out] = {group.template for group in groups}
    assert not seen[False] & seen[True]
    assert len(seen[True]) >= 9 and len(seen[False] | seen[True]) == len(NATURAL)


def test_facts_are_woven_into_sentences_of_the_corpus(source: Source) -> None:
    """Key and number stand once each, most often with the number first; questions have the key."""
    rng, first, templates = random.Random(6), 0, set[str]()
    for _ in range(300):
        group = draw_group(rng, "woven", source.wordings,
                           lambda r: draw_template(r, source))
        fact = group.make(rng, Words.draw(rng, source.corpus.words, 5, False), set())
        assert fact.text.count(fact.value) == 1 and fact.text.endswith(".")
        key_at = fact.text.lower().index(fact.key.lower())
        first += fact.text.index(fact.value) < key_at
        ((question, answer),) = fact.asks
        assert fact.key.lower() in question.lower() and fact.value not in question + answer
        templates.add(group.template)
    assert 0.5 < first / 300 < 0.7 and len(templates) > 290


def test_text_without_words_gives_frequent_ones(
    source: Source, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tables of numbers, say: drawing ends, and a sentence has words all the same."""
    monkeypatch.setattr(TokenTable, "text", lambda table, ids: "1 2 3 = x" * len(ids))
    words = draw_words(random.Random(0), source)
    assert 4 <= len(words) <= 14 and set(words) <= set(source.corpus.words)


def test_rows_have_woven_facts_where_the_corpus_is_known(source: Source) -> None:
    """Pre-training's rows draw them; a tokenizer's texts, made before any corpus, do not."""
    families = Counter(
        draw_group(random.Random(i), None, source.wordings, lambda r: "{v} is {k}").family
        for i in range(600))
    assert 60 < families["woven"] < 160
    assert all(draw_group(random.Random(i)).family != "woven" for i in range(300))
    plans = [draw_plan(random.Random(i), source, 8, 2048) for i in range(40)]
    assert any(fact.family == "woven" for plan in plans for fact in plan.facts)


def test_one_fact_is_asked_for_in_many_ways(source: Source) -> None:
    fact = draw_group(random.Random(3), "ruler").make(
        random.Random(3), Words.draw(random.Random(3), source.corpus.words, 5, False), set())
    rng = random.Random(0)
    asked = Counter(ask_one(rng, source, fact).question for _ in range(2000))
    assert len(asked) >= 24
    assert asked[fact.asks[0][0]] > 1000, "the evaluation's own wording stays the most frequent"
    assert all(fact.key in question for question in asked)
