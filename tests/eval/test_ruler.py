"""RULER's tasks: NVIDIA's strings, sizes and scorers, written here from their definitions."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from longspan.errors import LongspanError
from longspan.eval.metrics import string_match_all, string_match_part
from longspan.eval.prompt import Frame, Materials, bury_in_prose
from longspan.eval.task import Answer, Example, Task, rng_for
from longspan.eval.tasks import niah
from longspan.eval.tasks.registry import MACROS, RULER_11, TaskOptions, all_tasks, make_tasks
from longspan.eval.tasks.ruler import NOISE

TASKS = all_tasks(TaskOptions())
LENGTH = 4096
SINGULAR = {"numbers": "number", "uuids": "uuid", "words": "word"}
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
VALUES = {"numbers": r"[1-9]\d{6}", "uuids": UUID}
KEYS = {"words": r"[a-z]+-[a-z]+", "uuids": UUID}
# task: (haystack, key type, value type, keys, values, queries, tokens of the answer)
NIAH = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("prose", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("prose", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("prose", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("prose", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("prose", "words", "numbers", 4, 1, 4),
}


def build(task: Task | str, materials: Materials, length: int = LENGTH, index: int = 0,
          seed: int = 0) -> Example:
    task = TASKS[task] if isinstance(task, str) else task
    (example,) = task.build(materials, length, index, rng_for(task, length, seed, index))
    return example


@pytest.mark.parametrize("name", NIAH)
def test_needle_prompts(materials: Materials, name: str) -> None:
    haystack, key_type, value_type, num_keys, num_values, num_queries = NIAH[name]
    example = build(name, materials)
    text = example.prompt.text
    one = num_queries * num_values == 1
    noun = SINGULAR[value_type] if one else value_type
    begin = ("A special magic {} is hidden" if one else "Some special magic {} are hidden")
    head = ("<|im_start|>user\n" + begin.format(noun) + " within the following text. Make sure to "
            f"memorize it. I will quiz you about the {noun} afterwards.\n")
    assert text.startswith(head)
    ask = "What is the special magic" if one else "What are all the special magic"
    key, value = KEYS[key_type], VALUES[value_type]
    listed = key if num_queries == 1 else rf"{key}, {key}, {key}, and {key}"
    verb = "is" if one else "are"
    end = re.search(
        rf"\n{ask} {noun} for ({listed}) mentioned in the provided text\?<\|im_end\|>\n"
        rf"<\|im_start\|>assistant\n The special magic {noun} for \1 mentioned in the provided "
        rf"text {verb}$", text)
    assert end is not None
    asked = re.findall(key, end[1])
    needles = re.findall(rf"^One of the special magic {value_type} for ({key}) is: ({value})\.$",
                         text, re.MULTILINE)
    assert [v for k in asked for v in dict_of(needles)[k]] == list(example.gold.answers) or \
        sorted(v for k in asked for v in dict_of(needles)[k]) == sorted(example.gold.answers)
    assert len(example.gold.answers) == num_queries * num_values
    assert all(k not in asked or v in example.gold.answers for k, v in needles)
    if haystack == "needle":
        assert len(needles) > 20 and sum(k in asked for k, _ in needles) == 1
    else:
        assert len(needles) == num_keys * num_values
    if haystack == "noise":
        lines = text.removeprefix(head)[: end.start() - len(head)].split("\n")
        assert Counter(lines)[NOISE] == len(lines) - 1
    assert TASKS[name].max_tokens == 128


def dict_of(needles: list[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in needles:
        found.setdefault(key, []).append(value)
    return found


def test_no_distractor_has_the_key_that_is_asked_for(
    materials: Materials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's generator draws it again in 0.8 % of the prompts of a million tokens; here every
    fourth draw would."""
    monkeypatch.setitem(niah.DRAW, "words", lambda rng: rng.choice(["a-b", "c-d", "e-f", "g-h"]))
    example = build("niah_multikey_2", materials)
    asked = re.findall(r"number for (\S+) mentioned", example.prompt.text)[-1]
    assert example.prompt.text.count(f"numbers for {asked} is:") == 1


def test_noise_is_rulers() -> None:
    assert NOISE == ("The grass is green. The sky is blue. The sun is yellow. Here we go. There "
                     "and back again.")


@pytest.mark.parametrize(("name", "spaces"), [("vt", " "), ("vt_no_space", "")])
def test_variable_tracking(materials: Materials, name: str, spaces: str) -> None:
    example = build(name, materials)
    text = example.prompt.text
    intro = ("Memorize and track the chain(s) of variable assignment hidden in the following "
             "text.\n\n")
    assert text.count(intro) == 2 and text.startswith("<|im_start|>user\n" + intro)
    solved, _, rest = text.removeprefix("<|im_start|>user\n" + intro).partition(intro)
    value = re.findall(r"^VAR [A-Z]{5} = (\d{5})$", rest, re.MULTILINE)
    question = ("\nQuestion: Find all variables that are assigned the value {v} in the text above.")
    prefix = (" Answer: According to the chain(s) of variable assignment in the text above, 5 "
              "variables are assigned the value {v}, they are:" + spaces)
    assert rest.endswith((question + "<|im_end|>\n<|im_start|>assistant\n" + prefix).format(
        v=value[0]))
    names = example.gold.answers
    chain = re.findall(r"^VAR ([A-Z]{5}) = VAR ([A-Z]{5}) $", rest, re.MULTILINE)
    assert chain == list(zip(names[1:], names, strict=False)) and len(set(names)) == 5
    assert 10_000 <= int(value[0]) < 99_999
    # the solved example: three letters, another value, and its answer
    other = re.findall(r"^VAR [A-Z]{3} = (\d{5})$", solved, re.MULTILINE)
    assert solved.count("VAR ") == 9 and len(other) == 1
    shown = solved[solved.rindex("they are:"):]
    assert re.fullmatch(rf"they are:{spaces} [A-Z]{{3}}( [A-Z]{{3}}){{4}}\n\n", shown)
    assert question.format(v=other[0]) + prefix.format(v=other[0]) in solved
    # at most 500 tokens before the answer, and no room for another sentence
    before = intro + solved[: -len(shown)] + "they are:" + spaces
    size = materials.encoder.count(before)
    assert size <= 500 < size + materials.encoder.count(NOISE + "\n")
    assert TASKS[name].max_tokens == 30
    assert example.form == ("trailing space" if spaces else "no trailing space")


@pytest.mark.parametrize(("length", "example_counts", "counts", "form"), [
    (2048, {3: 10, 1: 10}, {6: 10, 1: 0}, "short form"),
    (16_384, {10: 10, 3: 30}, {30: 10, 3: 0}, "")])
def test_common_words(materials: Materials, length: int, example_counts: dict[int, int],
                      counts: dict[int, int], form: str) -> None:
    example = build("cwe", materials, length)
    intro = ("Below is a numbered list of words. In these words, some appear more often than "
             "others. Memorize the ones that appear most often.\n")
    question = "\nQuestion: What are the 10 most common words in the above list?"
    prefix = " Answer: The top 10 words that appear most often in the list are:"
    text = example.prompt.text
    assert text.startswith("<|im_start|>user\n" + intro)
    assert text.endswith(question + "<|im_end|>\n<|im_start|>assistant\n" + prefix)
    _, solved, rest = text.split(intro)
    listed, _, answered = solved.partition(question + prefix)
    shown = Counter(words_of(listed))
    assert Counter(shown.values()) == example_counts
    assert words_of(answered.removeprefix(" ").removesuffix("\n")) == [
        word for word in words_of(answered.strip()) if shown[word] == max(example_counts)]
    found = Counter(words_of(rest.partition(question)[0]))
    most, least = max(counts), min(counts)
    assert {word for word, count in found.items() if count == most} == set(example.gold.answers)
    assert set(found.values()) == {most, least} and len(example.gold.answers) == 10
    assert form in example.form and TASKS["cwe"].max_tokens == 120


def words_of(text: str) -> list[str]:
    """Words of a list ``1. a 2. b``, which must be numbered without gaps."""
    parts = text.split(" ")
    assert parts[::2] == [f"{i}." for i in range(1, len(parts) // 2 + 1)]
    return parts[1::2]


def test_the_standard_list_gives_way_to_the_short_one_where_it_does_not_fit(
    materials: Materials
) -> None:
    """As with every small vocabulary at 4,096 tokens."""
    example = build("cwe", materials, 4096)
    found = Counter(words_of(example.prompt.text.rpartition("most often.\n")[2].partition(
        "\nQuestion")[0]))
    assert max(found.values()) == 6 and "short form" in example.form
    with pytest.raises(LongspanError, match=r"too short for 20 words; at least \d+ tokens"):
        build("cwe", materials, 700)


def test_more_words_than_there_are_are_invented(materials: Materials) -> None:
    example = build("cwe", materials, 131_072)
    assert example.form == "invented words"
    few = replace(materials, words=tuple(f"word{chr(97 + i)}" for i in range(26)))
    assert "invented" in build("cwe", few, 4096).form


@pytest.mark.parametrize("length", [2048, 16_384])
def test_frequent_words(materials: Materials, length: int) -> None:
    example = build("fwe", materials, length)
    text = example.prompt.text
    head = ("<|im_start|>user\nRead the following coded text and track the frequency of each coded "
            "word. Find the three most frequently appeared coded words. ")
    tail = ("\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are "
            "the three most frequently appeared words in the above coded text?<|im_end|>\n"
            "<|im_start|>assistant\n Answer: According to the coded text above, the three most "
            "frequently appeared words are:")
    assert text.startswith(head) and text.endswith(tail)
    words = text.removeprefix(head).removesuffix(tail).split(" ")
    counts = Counter(words)
    assert all(re.fullmatch(r"[a-z]{6}|\.\.\.", word) for word in counts)
    ranked = [word for word, _ in counts.most_common()]
    assert ranked[:4] == ["...", *example.gold.answers]
    # rank k occurs floor(N / (k^2 zeta(2))) times, for one N and every rank of the vocabulary
    size = (length - 50) // 50
    fits = [n for n in range(len(words), 3 * len(words))
            if [c for k in range(1, size + 1) if (c := int(n / (k * k * math.pi**2 / 6)))]
            == sorted(counts.values(), reverse=True)]
    assert fits and TASKS["fwe"].max_tokens == 50


@pytest.mark.parametrize("name", [*RULER_11, "vt_no_space"])
@pytest.mark.parametrize("length", [2048, 4096, 32_768])
def test_lengths_are_full_never_over_and_tokens_are_those_of_the_text(
    materials: Materials, name: str, length: int
) -> None:
    task = TASKS[name]
    for frame in (materials.frame, Frame("", "", "none")):
        example = build(name, replace(materials, frame=frame), length, index=1)
        used = len(example.prompt.ids) + task.max_tokens
        unit = materials.encoder.count(NOISE + "\n")
        largest = {"niah_single_1": unit, "vt": unit, "vt_no_space": unit, "niah_multikey_2": 60,
                   "niah_multikey_3": 130, "cwe": 80, "fwe": 80}.get(name, 1)
        assert length - largest < used <= length
        example.prompt.check(materials.encoder)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multivalue", "niah_multikey_2", "vt",
                                  "fwe"])
def test_a_million_tokens(materials: Materials, name: str) -> None:
    example = build(name, materials, 1_048_576)
    used = len(example.prompt.ids) + TASKS[name].max_tokens
    assert 1_048_576 - 60 < used <= 1_048_576
    assert all(answer in example.prompt.text for answer in example.gold.answers)


@pytest.mark.parametrize("name", [*NIAH, "vt"])
def test_facts_stand_where_the_sample_says(materials: Materials, name: str) -> None:
    ids = (example := build(name, materials)).prompt.ids
    for position in example.positions:
        at = materials.encoder.tokenizer.decode(ids[position:position + 60])  # type: ignore[attr-defined]
        assert at.startswith(("One of the special magic", "VAR "))
    assert len(example.positions) == {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5}.get(
        name, 1)


def test_depths_are_spread_evenly(materials: Materials) -> None:
    """Chi-square over tenths of 300 prompts; 27.9 is exceeded once in a thousand times."""
    places = Counter(int(10 * build("niah_single_1", materials, 16_384, index).depth)
                     for index in range(300))
    mean = 300 / 10
    assert sum((places[i] - mean) ** 2 / mean for i in range(10)) < 27.9


def test_samples_differ_in_everything_and_come_again(materials: Materials) -> None:
    for name in RULER_11:
        hashes = [build(name, materials, 2048, index, seed).prompt.sha256
                  for index in (0, 1) for seed in (0, 1)]
        assert len(set(hashes)) == 4
        assert build(name, materials, 2048).prompt.sha256 == hashes[0]
    # in NVIDIA's generator the common words stand at the same places in every sample
    first, second = (build("cwe", materials, 4096, index) for index in (0, 1))
    places = [[i for i, word in enumerate(words_of(e.prompt.text.rpartition("most often.\n")[
        2].partition("\nQuestion")[0])) if word in e.gold.answers] for e in (first, second)]
    assert places[0] != places[1]


@pytest.mark.parametrize(("text", "answers", "every", "any_"), [
    ("It is ABC and def.", ("abc", "DEF"), 1.0, 1.0), ("abc", ("abc", "def"), 0.5, 1.0),
    ("", ("abc",), 0.0, 0.0), ("a\x00bc", ("abc",), 0.0, 0.0), ("xabcx", ("abc",), 1.0, 1.0)])
def test_scorers(text: str, answers: tuple[str, ...], every: float, any_: float) -> None:
    assert string_match_all(text, answers) == every
    assert string_match_part(text, answers) == any_


def test_verdicts(materials: Materials) -> None:
    task = TASKS["niah_multivalue"]
    example = build(task, materials)
    verdict = task.score(example.gold, Answer(text=" and ".join(example.gold.answers[:3])))
    assert verdict.score == 0.75 and verdict.hits == (True, True, True, False)
    assert not task.is_binary and TASKS["niah_single_1"].is_binary


def test_groups() -> None:
    assert len(RULER_11) == 11 and len(MACROS["ruler-13"]) == 13
    assert MACROS["ruler-tracking"] == ("vt",) and MACROS["ruler-counting"] == ("cwe", "fwe")
    names = [task.name for task in make_tasks(["ruler-11", "vt"], TaskOptions())]
    assert sorted(names) == sorted([*RULER_11, "vt_no_space"])
    with pytest.raises(LongspanError, match="no task is called 'nihs_single_1'; did you mean niah"):
        make_tasks(["nihs_single_1"], TaskOptions())
    with pytest.raises(LongspanError, match="see longspan eval list"):
        make_tasks(["###"], TaskOptions())


def test_depths_of_needles_in_prose_are_different_ones_of_forty(
    materials: Materials, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[float]] = []

    def spy(*args: Any, **fields: Any) -> Any:
        found.append([depth for depth, _ in fields["facts"]])
        return bury_in_prose(*args, **fields)

    monkeypatch.setattr(niah, "bury_in_prose", spy)
    for index in range(30):
        build("niah_multivalue", materials, 2048, index)
    steps = [[round(39 * depth, 9) for depth in depths] for depths in found]
    assert all(len(set(each)) == 4 and set(each) <= set(range(40)) for each in steps)
    assert {0, 39} <= {step for each in steps for step in each}
