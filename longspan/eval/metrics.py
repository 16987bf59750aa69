"""Scores of an answer's text, from 0 to 1, as the benchmarks that use them define them.

RULER's substring tests (NVIDIA/RULER, Apache-2.0); LongBench's F1, ROUGE-L, edit similarity and
counting scores (THUDM/LongBench, MIT); LV-Eval's F1 behind a recall of key words
(infinigence/LVEval, MIT).
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from longspan.errors import MissingDependencyError

Words = Callable[[str], Sequence[str]]

CONTROL = re.compile(r"[\x00-\x1f]")
ARTICLES = re.compile(r"\b(a|an|the)\b")
CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
    "–—‘’‛“”„‟…‧﹏.")
EPSILON = 1e-8
"""In the denominator of ROUGE-L's F1, as in the package that LongBench uses."""


def clean_prediction(text: str) -> str:
    """Clean an answer as RULER does: outer white space is removed, control characters become line
    ends."""
    return CONTROL.sub("\n", text.strip()).strip()


def string_hits(text: str, answers: Sequence[str]) -> tuple[bool, ...]:
    """Return which answers the text contains, whatever their case."""
    found = clean_prediction(text).lower()
    return tuple(answer.lower() in found for answer in answers)


def string_match_all(text: str, answers: Sequence[str]) -> float:
    """Score as RULER does: the share of the answers that the text contains."""
    return sum(string_hits(text, answers)) / len(answers)


def string_match_part(text: str, answers: Sequence[str]) -> float:
    """Score as RULER does: 1 if the text contains any of the answers."""
    return float(any(string_hits(text, answers)))


def first_number(text: str) -> str | None:
    """Return the first run of digits."""
    found = re.search(r"\d+", text)
    return found.group() if found else None


def english_words(text: str) -> list[str]:
    """Return words without punctuation, articles and capitals."""
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return ARTICLES.sub(" ", bare).split()


def chinese_words(text: str) -> list[str]:
    """Return the words as jieba cuts them, without punctuation and capitals.

    Raises `MissingDependencyError` without jieba.
    """
    bare = [_bare_chinese(word) for word in cut_chinese(text)]
    return [word for word in bare if word]


def cut_chinese(text: str) -> list[str]:
    """Cut Chinese text into words. Raises `MissingDependencyError` without jieba."""
    try:
        import jieba
    except ImportError:
        raise MissingDependencyError(
            "Chinese answers are scored by words, which jieba finds; it is not installed: "
            "pip install 'longspan[longbench]'") from None
    return list(jieba.cut(text, cut_all=False))


def f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Compute the harmonic mean of precision and recall of words, counted as often as they
    occur."""
    num_same = sum((Counter(prediction) & Counter(answer)).values())
    if not num_same:
        return 0.0
    precision, recall = num_same / len(prediction), num_same / len(answer)
    return 2 * precision * recall / (precision + recall)


def keyword_recall(
    prediction: Sequence[str], keywords: Sequence[str], ignored: Collection[str]
) -> float:
    """Score as LV-Eval does: the share of the key words in the prediction; ignored words count as
    not found."""
    common = Counter(prediction) & Counter(keywords)
    found = sum(count for word, count in common.items() if word not in ignored)
    return found / len(keywords) if keywords else 0.0


def rouge_l(prediction: str, answer: str) -> float:
    """Compute ROUGE-L of summaries: F1 of the words in longest common subsequences of all pairs of
    sentences, each word counted once; sentences end in full stops, words at white space."""
    mine, gold = _sentences(prediction), _sentences(answer)
    if not mine or not gold:
        return 0.0
    common: set[str] = set()
    for sentence in gold:
        for other in mine:
            common.update(_common_subsequence(sentence, other))
    precision = len(common) / len({word for sentence in mine for word in sentence})
    recall = len(common) / len({word for sentence in gold for word in sentence})
    return 2 * precision * recall / (precision + recall + EPSILON)


def edit_similarity(prediction: str, answer: str) -> float:
    """Score code as LongBench does: similarity of the answer and the first line that is no
    comment."""
    lines = [line for line in prediction.lstrip("\n").split("\n")
             if not any(mark in line for mark in ("`", "#", "//"))]
    matcher = difflib.SequenceMatcher(None, lines[0] if lines else "", answer)
    return round(100 * matcher.ratio()) / 100


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Score as LongBench does: 1 over the number of classes named, if the right one is among them.
    Names that are part of the right one do not count (LongBench means to leave them out, but misses
    every second one of neighbours)."""
    named = [name for name in classes
             if name in prediction and not (name in answer and name != answer)]
    return 1 / len(named) if answer in named else 0.0


def share_of_numbers(prediction: str, answer: str) -> float:
    """Score counts and paragraphs as LongBench does: the share of the numbers in the text that are
    right."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def best(metric: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    """Return the highest score against any of the answers."""
    return max((metric(prediction, answer) for answer in answers), default=0.0)


def _bare_chinese(word: str) -> str:
    excluded = string.punctuation + CHINESE_PUNCTUATION
    return "".join("".join(char for char in word.lower() if char not in excluded).split())


def _sentences(text: str) -> list[list[str]]:
    return [words for part in text.split(".") if (words := part.split())]


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Return a longest common subsequence of words."""
    lengths = _subsequence_lengths(first, second)
    found = []
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            found.append(first[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def _subsequence_lengths(first: Sequence[str], second: Sequence[str]) -> list[list[int]]:
    """Return the length of the longest common subsequence of all pairs of beginnings."""
    lengths = [[0] * (len(second) + 1)]
    for a in first:
        above, row = lengths[-1], [0]
        for j, b in enumerate(second, 1):
            row.append(above[j - 1] + 1 if a == b else max(above[j], row[j - 1]))
        lengths.append(row)
    return lengths
