"""Exercises: right answers are right, wrong ones are found out and named."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from longspan.data.chat.gold import COUNT, NAME, UUID, Gold
from longspan.data.chat.rows import (
    CHAT,
    EXERCISES,
    PAIRS,
    WEIGHTS,
    ChatPlanner,
    compose,
    draw_exercise,
)
from longspan.data.chat.verify import find_mistake
from longspan.data.chat.wrong import (
    CUT,
    EXTRA,
    FALSE_REFUSAL,
    INVENTED,
    MISTAKES,
    NEAR_MISS,
    NO_ANSWER,
    OTHER,
    REPEATED,
    SWAPPED,
    near_miss,
    wrong_reply,
)
from longspan.data.questions import LEADS, PHRASES
from longspan.data.source import Source, load_source

ONE = Gold(items=("1234567",), others=("7654321",), keys=("otter-99887",), refusal="Not there.",
           frame="The number for otter-99887 is {}.")
LIST = replace(ONE, items=("1234567", "2345678", "3456789"), is_ordered=True, frame="{}")
ABSENT = replace(ONE, items=(), frame="{}")
CHAIN = Gold(items=("ABCDE", "vinqua"), others=("FGHIJ",), keys=("12345",), kind=NAME,
             by_space=True, refusal="Not there.")


@pytest.mark.parametrize(("gold", "reply", "mistake"), [
    (ONE, "1234567", None), (ONE, "It is 1234567. Yes, 1234567!", None),
    (ONE, "The number for otter-99887 is 1234567.", None), (ONE, "7654321", OTHER),
    (ONE, "1234576", NEAR_MISS), (ONE, "9999999", INVENTED), (ONE, "12345678", INVENTED),
    (ONE, "The text doesn't say.", FALSE_REFUSAL), (ONE, "Hello!", NO_ANSWER), (ONE, "", NO_ANSWER),
    (ONE, "1234567 and 7654321", EXTRA),
    (LIST, "1234567, 2345678, and 3456789", None), (LIST, "1234567 and 3456789", CUT),
    (LIST, "2345678, 1234567, and 3456789", SWAPPED),
    (LIST, "1234567, 1234567, and 3456789", REPEATED),
    (LIST, "1234567, 2345678, 3456789 and 3456789", REPEATED),
    (LIST, "1234567, 2345678, and 7654321", OTHER),
    (LIST, "1234567, 2345678, 3456789, and 7654321", EXTRA),
    (replace(LIST, is_ordered=False), "2345678, 1234567, and 3456789", None),
    (ABSENT, "The text does not say.", None), (ABSENT, "There is no such number.", None),
    (ABSENT, "7654321", OTHER), (ABSENT, "It is 5555555.", INVENTED), (ABSENT, "Well.", NO_ANSWER),
    (ABSENT, "The text does not mention otter-99887.", None),
    (CHAIN, "ABCDE vinqua", None), (CHAIN, "12345 belongs to: vinqua ABCDE.", None),
    (CHAIN, "ABCDE", CUT), (CHAIN, "ABCDE vinqua FGHIJ", EXTRA), (CHAIN, "ABCDE FGHIJ", OTHER),
    (replace(ONE, items=("67",)), "It is 67.", None),
    (replace(ONE, items=("67",)), "68", NEAR_MISS),
    (replace(ONE, items=("67",)), "67 or 84", EXTRA),
    (ABSENT, "It is 84.", INVENTED),
    (replace(ONE, kind=COUNT, items=("14",)), "It appears 14 times.", None),
    (replace(ONE, kind=COUNT, items=("14",)), "15", NEAR_MISS),
    (replace(ONE, kind=UUID, items=("00000000-0000-4000-8000-000000000000",)),
     "00000000-0000-4000-8000-000000000001", NEAR_MISS)])
def test_mistakes_have_their_names(gold: Gold, reply: str, mistake: str | None) -> None:
    assert find_mistake(reply, gold) == mistake


@pytest.mark.parametrize("name", EXERCISES)
def test_right_replies_are_right_and_wrong_ones_are_not(source: Source, name: str) -> None:
    rng = random.Random(name)
    for _ in range(25):
        exercise, num_tokens = draw_exercise(rng, source, {name: 1}, 1024, many=True)
        assert num_tokens <= 1024 and exercise.task == name
        for turn in exercise.turns:
            assert find_mistake(turn.gold.right, turn.gold) is None, turn
            for item in turn.gold.items:
                assert turn.gold.kind == COUNT or item in exercise.document
            reply, why = wrong_reply(rng, turn.gold)
            assert reply != turn.gold.right and find_mistake(reply, turn.gold), (reply, why, turn)
        if name == "absent":
            key, = exercise.turns[-1].gold.keys
            assert not exercise.turns[-1].gold.items and key not in exercise.document


def test_named_mistakes_are_recognised() -> None:
    """In lists of numbers each mistake can be told from every other one."""
    rng = random.Random(5)
    names = Counter()
    for _ in range(400):
        reply, why = wrong_reply(rng, LIST)
        names[why] += 1
        assert find_mistake(reply, LIST) == why, (reply, why)
    assert set(names) == set(MISTAKES) and min(names.values()) > 10
    assert all(near_miss(rng, "7777777") != "7777777" for _ in range(50))
    assert near_miss(rng, "vinqua") is None


def test_pairs_refuse_less_often_than_they_answer(source: Source) -> None:
    """Rejected refusals of keys that are there keep a model from refusing everything."""
    planner = ChatPlanner(form=PAIRS, num_rows={1024: 150}, seed=3)
    pairs = [compose(planner, source, 1024, i) for i in range(150)]
    whys = Counter(pair["why"] for pair in pairs)
    assert whys[FALSE_REFUSAL] >= 5 and whys[INVENTED] >= 15 and whys[CUT] >= 10
    assert {pair["task"] for pair in pairs} == set(WEIGHTS[PAIRS])
    for pair in pairs:
        assert [m["role"] for m in pair["messages"]] == ["user"]
        assert pair["chosen"] != pair["rejected"] and pair["num_tokens"] <= 1024


def test_held_out_rows_have_other_wordings(data_dir: Path, source: Source) -> None:
    held_out = load_source(data_dir, "held_out")
    planner = ChatPlanner(form=CHAT, num_rows={640: 1}, seed=0, weights={"needle": 1})

    def forms(which: Source) -> set[str]:
        text = " ".join(m["content"] for i in range(60)
                        for m in compose(planner, which, 640, i)["messages"])
        options = [*LEADS, *(form.split("{")[0] for form in PHRASES if not form.startswith("{"))]
        return {form for form in options if re.search(re.escape(form), text)}
    assert forms(source) and forms(held_out)
    assert not forms(source) & {LEADS[4], LEADS[9]} and forms(held_out) >= {LEADS[4], LEADS[9]}


def test_several_questions_follow_one_document(source: Source) -> None:
    planner = ChatPlanner(form=CHAT, num_rows={2048: 1}, seed=1)
    rows = [compose(planner, source, 2048, i) for i in range(40)]
    assert rows == [compose(planner, source, 2048, i) for i in range(40)]
    turns = Counter(len(row["messages"]) // 2 for row in rows)
    assert set(turns) == {1, 2, 3}
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
