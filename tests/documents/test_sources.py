"""Where answers stand in documents: right files for right answers, none for what nobody wrote."""

from __future__ import annotations

import random
import time

import pytest

from longspan.documents.gather import Document
from longspan.documents.sources import MAX_QUOTE, SourceIndex, describe_sources
from longspan.documents.words import words, words_at

FIRST = ["Mara", "Jonas", "Ilse", "Tomas", "Greta", "Henrik", "Paula", "Viktor", "Nadia", "Oskar"]
LAST = ["Lindqvist", "Aldrich", "Voss", "Marek", "Halloran", "Pell", "Santoro", "Kessler", "Ivers",
        "Brandt"]
KINDS = ["observatory", "library", "museum", "school"]
ASKED = "Who was the first director of the {kind} of Town{number}?"
PHRASES = [
    "{director}", "{director}.", "The first director was {director}.",
    "The first director of the {kind} of Town{number} was {director}.",
    "According to the documents, {director} was the first director of that {kind}, who had studied"
    " in Uppsala.\n",
    "According to the information that was provided in the file, it was {director}.",
]


def forty_cases() -> list[dict[str, str]]:
    """Alike but for names and numbers; people share first and last names."""
    rng = random.Random(20261129)
    people = [f"{first} {last}" for first in FIRST for last in LAST]
    rng.shuffle(people)
    return [{"number": str(i), "kind": KINDS[i % 4], "director": people[2 * i],
             "architect": people[2 * i + 1], "year": str(1820 + i % 20)} for i in range(40)]


def text_of(case: dict[str, str]) -> str:
    return ("The {kind} of Town{number} was founded in {year} by the town council.\nIts first "
            "director was {director}, who had studied in Uppsala. It was extended by the architect "
            "{architect}, and has many employees.").format(**case)


CASES = forty_cases()
INDEX = SourceIndex([Document(f"cases/{case['number']}.txt", text_of(case)) for case in CASES])


@pytest.mark.parametrize("phrase", PHRASES)
def test_the_right_one_of_forty_files(phrase: str) -> None:
    for case in CASES:
        found = INDEX.find(phrase.format(**case), ASKED.format(**case))
        assert found[0].name == f"cases/{case['number']}.txt"
        text = text_of(case)
        assert case["director"] in text[found[0].start : found[0].stop]
        assert found[0].line == text[: found[0].start].count("\n") + 1
        assert found[0].quote in " ".join(text.split())


def test_a_year_that_many_files_have_is_told_apart_by_the_question() -> None:
    for case in CASES:
        question = "When was the {kind} of Town{number} founded?".format(**case)
        (found, *_) = INDEX.find(case["year"], question)
        assert found.name == f"cases/{case['number']}.txt"


def test_a_wrong_answer_shows_where_it_comes_from() -> None:
    """From another file than the one that was asked about, which is named too."""
    asked, other = CASES[3], CASES[17]
    source, about = INDEX.find(f"It was {other['director']}.", ASKED.format(**asked))
    assert source.name == "cases/17.txt" and not source.is_asked
    assert about.name == "cases/3.txt" and about.is_asked
    assert describe_sources([source, about]).splitlines()[1].startswith("Asked about: cases/3.txt")


@pytest.mark.parametrize("answer", [
    "Zebulon Quatermain.", "I do not know.", "", "...", "The moon is made of green cheese."])
def test_what_nobody_wrote_has_no_source(answer: str) -> None:
    assert INDEX.find(answer, ASKED.format(**CASES[0])) == []
    assert "none" in describe_sources([])


def test_sentences_have_sources_of_their_own() -> None:
    one, two = CASES[5], CASES[8]
    found = INDEX.find(f"{one['director']} led one.\nThe other was extended by {two['architect']}.")
    assert {source.name for source in found} == {"cases/5.txt", "cases/8.txt"}


def test_files_that_say_the_same_are_all_named() -> None:
    index = SourceIndex([Document("a", "The code is 7123."), Document("b", "Nothing here."),
                         Document("c", "As a says, the code is 7123.")])
    assert {source.name for source in index.find("7123", "What is the code?")} == {"a", "c"}


def test_the_tightest_passage_of_a_long_document() -> None:
    rng = random.Random(1)
    filler = [f"word{rng.randrange(500)}" for _ in range(5000)]
    text = " ".join([*filler[:2500], "the lock is", "released by the janitor", *filler[2500:]])
    text = text.replace("word7 ", "janitor word7 ")
    (found, *_) = SourceIndex([Document("long", text)]).find("It is released by the janitor.")
    assert text[found.start : found.stop].endswith("released by the janitor")
    assert len(found.quote) <= MAX_QUOTE
    assert describe_sources([found]).startswith(
        f"Source: long, line 1 (characters {found.start:,}-{found.stop:,}): \"")


def test_long_answers_about_long_documents_take_seconds_of_no_one() -> None:
    """Forty sentences and a hundred thousand words: a sentence does not read them all again."""
    rng = random.Random(2)
    vocabulary = [f"w{number}" for number in range(20_000)]
    texts = [" ".join(rng.choices(vocabulary, k=2_500)) for _ in range(40)]
    sentences = [" ".join(text.split()[300:312]) + "." for text in texts]
    index = SourceIndex([Document(str(i), text) for i, text in enumerate(texts)])
    start_s = time.process_time()
    found = index.find(" ".join(sentences), "What?")
    assert time.process_time() - start_s < 1
    assert len(found) == 5 and all(source.share == 1 for source in found)


def test_scripts_without_spaces() -> None:
    index = SourceIndex([Document("a", "天文台的第一任台长是李明。"),
                         Document("b", "图书馆的馆长是王芳。")])
    assert [source.name for source in index.find("是王芳。", "馆长是谁?")] == ["b"]
    assert words("李明来") == ["李明", "明来"] and words("李") == ["李"]


def test_words_and_their_places() -> None:
    text = "Keys_of caches, 1,024 of them"
    assert words(text) == ["key", "of", "cache", "1", "024", "of", "them"]
    for word, start, stop in words_at(text):
        assert text[start:stop].lower().startswith(word)
