"""Rows of conversations: exact lengths, only replies are answers; RULER's forms are RULER's."""

from __future__ import annotations

import difflib
import random
import re

import numpy as np
import pytest

from longspan.data.chat import ruler, sentences
from longspan.data.chat.gold import Gold
from longspan.data.chat.practice import compose_practice, encode_exercise
from longspan.data.chat.rows import EXERCISES, PAIRS, ChatPlanner, compose, draw_exercise
from longspan.data.chat.sentences import draw_sentence
from longspan.data.chat.verify import find_mistake
from longspan.data.chat.wrong import FALSE_REFUSAL
from longspan.data.facts import NATURAL
from longspan.data.questions import ABSENT_RULES, REFUSALS, SHORT_REFUSALS
from longspan.data.source import Source
from longspan.data.tokens import IM_END, Kind
from longspan.eval.tasks.needles import REFUSAL_INSTRUCTION
from longspan.eval.tasks.needles import REFUSALS as ACCEPTED
from longspan.eval.tasks.ruler import COMMON_WORDS, FREQUENT_WORDS, NIAH, VARIABLES
from longspan.eval.tasks.wordings import FRESH, UNSEEN

NOTHING = Gold(items=(), refusal="The text does not say.")


@pytest.mark.parametrize("length", [1024, 4096])
def test_rows_have_their_length_and_their_seed(source: Source, length: int) -> None:
    ids, kinds = compose_practice((3, 1), source, 4, length)
    assert ids.shape == kinds.shape == (4, length) and ids.dtype == np.uint32
    again, _ = compose_practice((3, 1), source, 4, length)
    assert (ids == again).all()
    other, _ = compose_practice((3, 2), source, 4, length)
    assert (ids != other).any(axis=1).all()
    assert (kinds == Kind.ANSWER).any(axis=1).mean() >= 0.75


@pytest.mark.parametrize("name", EXERCISES)
def test_only_replies_are_answers(source: Source, name: str) -> None:
    """All of a reply is an answer or the sentence around it, and nothing else is."""
    rng = random.Random(name)
    exercise, _ = draw_exercise(rng, source, {name: 1}, 1024, many=True)
    piece = encode_exercise(source, exercise)
    is_reply = (piece.kinds == Kind.ANSWER) | (piece.kinds == Kind.COPY)
    said = source.table.text(piece.ids[is_reply])
    assert said == "".join(turn.gold.right + IM_END for turn in exercise.turns)
    text = source.table.text(piece.ids)
    assert text.startswith("<|im_start|>user\n") and text.count("<|im_start|>assistant\n") == len(
        exercise.turns)


@pytest.mark.parametrize(("name", "template", "values"), [
    ("ruler_niah", NIAH, {"type": r"(?:number|word|uuid)s", "query": ".+"}),
    ("ruler_variables", VARIABLES, {"query": r"\d{5}", "num_v": r"\d"}),
    ("ruler_words", COMMON_WORDS, {}), ("ruler_words", FREQUENT_WORDS, {})])
def test_questions_and_answers_are_in_rulers_form(
    source: Source, name: str, template: object, values: dict[str, str]
) -> None:
    """Head, question and beginning of the answer as the evaluation has them."""
    marks = {key: f"<{key}>" for key in values}
    head, tail, prefix = (re.escape(text) for text in template.fill(**marks))  # type: ignore[attr-defined]
    for key, pattern in values.items():
        head, tail, prefix = (text.replace(f"<{key}>", pattern) for text in (head, tail, prefix))
    number = "10" if template is COMMON_WORDS else ""
    rng, seen = random.Random(1), 0
    for _ in range(60):
        exercise, _ = draw_exercise(rng, source, {name: 1}, 2048, many=False)
        messages = exercise.messages()
        asked, said = messages[0]["content"], messages[1]["content"]
        if number and f"the {number} most" not in asked or len(exercise.turns[0].gold.items) < 2:
            continue
        seen += bool(re.search(head, asked) and re.search(tail + "$", asked)
                     and re.match(prefix, said))
    assert seen >= 4, f"{seen} of 60 rows are in RULER's form"


def test_chains_are_assigned_as_ruler_assigns_them(source: Source) -> None:
    exercise, _ = draw_exercise(random.Random(2), source, {"ruler_variables": 1}, 2048, many=False)
    lines = exercise.document[exercise.document.rindex(ruler.VT_HEAD):].splitlines()
    own = exercise.turns[0].gold.items
    value, = exercise.turns[0].gold.keys
    assert f"VAR {own[0]} = {value}" in lines
    for before, after in zip(own, own[1:], strict=False):
        assert f"VAR {after} = VAR {before} " in lines


def test_the_evaluations_wordings_are_not_practised(source: Source) -> None:
    """No word that carries a wording of the evaluation is in ours, and no wording of it is asked
    for in pre-training, though some share a verb."""
    forms = {re.sub(r"[^a-z{}]+", " ", form.lower().format(k="{key}", v="{value}"))
             for _, *pair in NATURAL for form in pair}
    asked = {re.sub(r"[^a-z{}]+", " ", form.lower()) for pair in (*UNSEEN, *FRESH) for form in pair}
    assert not forms & asked and len(forms) > 20
    for form in asked:
        near = difflib.get_close_matches(form, forms, 1, cutoff=0.8)
        assert not near, (form, near)
    rng = random.Random(3)
    drawn = [draw_sentence(rng, source, "kind-key") for _ in range(4000)]
    text = " ".join(part.lower() for one in drawn for part in (one.text, one.question))
    for word in ("parcel", "milligram", "visitors who", "dial", "seat ", "stadium", "lighthouse",
                 "flashes", "auction", "bidder", "bought", "weigh"):
        assert word in " ".join(part.lower() for pair in UNSEEN for part in pair) + " "
        assert word not in text, word
    assert not any(rule.split("{")[0] in REFUSAL_INSTRUCTION for rule in ABSENT_RULES
                   if not rule.startswith(("Say", "Write")))
    forms = {one.text.replace(one.value, "") for one in drawn}
    assert len(forms) > 2500, "countless wordings"


def test_sentences_say_their_number_in_any_place(source: Source) -> None:
    """Before the key as often as behind it, in the corpus' words as often as in ours; the question
    names the key and never the number."""
    rng = random.Random(4)
    drawn = [draw_sentence(rng, source, f"kind-key{chr(97 + i // 26)}{chr(97 + i % 26)}")
             for i in range(600)]
    for one in drawn:
        assert one.text.lower().count(one.key) == 1 and one.text.count(one.value) == 1, one
        assert one.key in one.question.lower() and one.value not in one.question, one
    is_first = [one.text.index(one.value) < one.text.lower().index(one.key) for one in drawn]
    assert 0.35 < sum(is_first) / len(drawn) < 0.65
    natural = set(source.corpus.words)
    shares = [sum(word in natural for word in re.findall("[a-z]+", one.text.lower()))
              / len(one.text.split()) for one in drawn]
    assert 0.3 < sum(share > 0.5 for share in shares) / len(drawn) < 0.7


def test_what_is_absent_is_refused_though_another_fact_has_its_number(
    source: Source, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A text of many facts has a good part of all numbers of two digits."""
    monkeypatch.setattr(sentences, "_DIGITS", ((2,), (1,)))
    num_refused = 0
    for seed in range(20):
        exercise = sentences.sentences(random.Random(seed), source, 4096, 16)
        for turn in [] if exercise is None else exercise.turns:
            is_there = turn.gold.keys[0].lower() in exercise.document.lower()
            assert bool(turn.gold.items) is is_there, turn
            num_refused += not is_there
    assert num_refused > 20


def test_pairs_reward_and_punish_refusals_alike(source: Source) -> None:
    planner = ChatPlanner(form=PAIRS, num_rows={1024: 400}, seed=5)
    pairs = [compose(planner, source, 1024, i) for i in range(400)]
    wanted = sum(find_mistake(pair["chosen"], NOTHING) is None for pair in pairs)
    unwanted = sum(pair["why"] == FALSE_REFUSAL for pair in pairs)
    assert 0.67 < wanted / unwanted < 1.5, (wanted, unwanted)


def test_each_refusal_is_one_for_the_evaluation() -> None:
    for refusal in (*REFUSALS, *SHORT_REFUSALS):
        assert ACCEPTED.search(refusal.replace("{n}", "number")), refusal
