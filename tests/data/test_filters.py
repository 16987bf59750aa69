"""Filters and duplicates."""

from __future__ import annotations

import random

import pytest

from longspan.data.duplicates import Duplicates, sketch
from longspan.data.filters import Filters, Refusal
from longspan.data.vocabulary import pseudo_word

PROSE = "A line of ordinary words, long enough to count.\n" * 20


def words(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [pseudo_word(rng) for _ in range(count)]


@pytest.mark.parametrize(("filters", "text", "reason"), [
    (Filters(max_chars=100), PROSE, "longer than 100 characters"),
    (Filters(max_mean_line=20), PROSE, "lines longer than 20 characters"),
    (Filters(min_ascii=0.97), PROSE + "é" * 100, "less than 97% ASCII"),
    (Filters(min_letters=0.5), "1234567890 0987654321 {}[]();\n" * 40, "less than 50% letters"),
])
def test_rules_that_are_asked_for(filters: Filters, text: str, reason: str) -> None:
    assert Refusal(filters)(text) == reason


@pytest.mark.parametrize("text", [
    "bzip2 (1.0.8-5+b1) bookworm; urgency=low, binary-only=yes\n\n  * Binary-only non-maintainer "
    "upload for amd64; no source changes.\n  * Rebuild.\n\n -- amd64 / i386 Build Daemon "
    "(x86-ubc-01) <buildd_amd64-x86-ubc-01@buildd.example.org>  Thu, 20 Jan 2022 22:43:24 +0100\n",
    "".join(f"Jane{i} Doe <jane{i}.doe@example{i}.org>\n" for i in range(60)),
    "std::vector<int> f(std::map<std::string, T> a) { return a < b && c > d; }\n// why\n" * 3])
def test_what_looks_like_noise_or_markup_and_is_none(text: str) -> None:
    assert Refusal(Filters())(text) is None


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_the_sketch_estimates_what_is_common(share: float) -> None:
    """Jaccard index of two texts of which a share is the same."""
    num_same = int(2000 * share)
    first, second = words(1, 2000), words(2, 2000)
    second[:num_same] = first[:num_same]
    a, b = (sketch(" ".join(text).encode()) for text in (first, second))
    assert abs((a == b).mean() - share / (2 - share)) < 0.12


def test_near_duplicates_of_any_size_are_found() -> None:
    for count in (60, 3000, 200_000):
        text = words(count, count)
        changed = [*text[: count // 2], "changed", *text[count // 2 + 1 :]]
        known = Duplicates(0.8)
        assert known.find(" ".join(text)) is None
        assert known.find(" ".join(text).upper()) == "duplicate"
        assert known.find(" ".join(changed)) == "near-duplicate"
        assert known.find(" ".join(words(count + 1, count))) is None


def test_only_exact_duplicates_go_where_that_is_asked() -> None:
    text = words(1, 500)
    known = Duplicates(None)
    assert [known.find(" ".join(t)) for t in (text, [*text, "more"], text)] == [
        None, None, "duplicate"]
