"""Incremental text: characters split over tokens, runs of invalid bytes, stop strings."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from longspan.engine.text.text_stream import (
    MAX_WINDOW,
    Detokenizer,
    StopMatcher,
    TextStream,
)
from longspan.engine.text.tokenizer import Tokenizer
from tests.doubles import write_tokenizer
from tests.engine.text.kinds import sentence_piece_bpe

TEXTS = ["plain", "naïve café", "长文本 和 汉字", "🙂👩‍👩‍👧 emoji", "a\nb\t c  ", "\ufffd real"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return Tokenizer(path)


@pytest.mark.parametrize("text", TEXTS)
def test_characters_split_over_tokens_arrive_whole(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + detokenizer.flush() == text
    for end in range(len(pieces)):
        assert text.startswith("".join(pieces[:end]))


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_decode_as_they_would_in_one_go(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    whole = "".join(rng.choice(TEXTS) for _ in range(3))
    token_ids = [token for token in tokenizer.encode(whole) if rng.random() < 0.9]
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(token) for token in token_ids) + detokenizer.flush()
    assert text == tokenizer.decode(token_ids), f"seed {seed}"


def test_an_incomplete_character_comes_at_the_end_only(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(token) for token in list(tokenizer.encode("é"))[:1]] == [""]
    assert detokenizer.flush() == "\ufffd"


def test_the_window_stays_short(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    for token in tokenizer.encode("x" * 500):
        detokenizer.push(token)
        assert len(detokenizer._window) <= 2


@pytest.mark.parametrize(("stop", "pieces", "expected"), [
    (["END"], ["abc", "END", "d"], ["abc", ""]),
    (["END"], ["abE", "N", "D"], ["ab", "", ""]),
    (["END"], ["abE", "N", "X"], ["ab", "", "ENX"]),
    (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""]),
    (["\n\n"], ["x\n", "y\n", "\nz"], ["x", "\ny", ""]),
    (["b", "ab"], ["xa", "b"], ["x", ""]),
    (["longer", "on"], ["l", "o", "n"], ["", "", "l"]),
])
def test_stop_strings(stop: list[str], pieces: list[str], expected: list[str]) -> None:
    matcher = StopMatcher(stop)
    found = []
    for piece in pieces:
        found.append(matcher.push(piece))
        if matcher.is_stopped:
            break
    assert found == expected
    if matcher.is_stopped:
        assert matcher.push("more") + matcher.flush() == ""


@pytest.mark.parametrize("seed", range(30))
def test_stop_matching_does_not_depend_on_the_pieces(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(40))
    stop = ["".join(rng.choice("ab") for _ in range(rng.randrange(2, 7)))]
    matcher, output, rest = StopMatcher(stop), "", text
    while rest and not matcher.is_stopped:
        cut = rng.randrange(1, 4)
        output += matcher.push(rest[:cut])
        rest = rest[cut:]
    assert output + matcher.flush() == text.split(stop[0])[0], f"seed {seed}"


def test_stream_joins_both(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["é"])
    pieces = [stream.push(token) for token in tokenizer.encode("café!")]
    assert (pieces, stream.is_stopped) == (["c", "a", "f", "", "", ""], True)
    stream = TextStream(tokenizer, ["fin"])
    assert stream.push(tokenizer.encode("f")[0]) == "" and stream.flush() == "f"


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_decode_as_they_would_in_one_go(tokenizer: Tokenizer, seed: int) -> None:
    """Invalid bytes, halves of characters, real U+FFFD and special tokens, long runs of each."""
    rng = random.Random(seed)
    runs = [list(tokenizer.encode(text)) for text in ("é", "🙂", "\ufffd", "x")]
    runs += [[run[0]] for run in runs] + [run[1:] or [256] for run in runs] + [[256]]
    ids = [token for _ in range(12) for token in rng.choice(runs) * rng.choice((1, 2, 40))]
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
    assert text == tokenizer.decode(ids), f"seed {seed}"


@pytest.mark.parametrize("run", ["\ufffd", "bytes", "half", "special"])
@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_a_token_takes_constant_time_whatever_it_is(
    tokenizer: Tokenizer, tmp_path: Path, run: str, kind: str,
) -> None:
    """Counted, not timed: tokens that are decoded for each that is pushed."""
    if kind == "byte fallback":
        sentence_piece_bpe().save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer(tmp_path)
    special = next(iter(tokenizer.special_tokens))
    tokens = {"\ufffd": tokenizer.encode("\ufffd")[-3:], "bytes": tokenizer.encode("é")[-1:],
              "half": tokenizer.encode("🙂")[-4:-1],
              "special": [tokenizer.encode("é")[-2], special]}
    lengths = list[int]()
    decode = tokenizer.decode

    class Counting:
        special_tokens = tokenizer.special_tokens

        def decode(self, ids: list[int]) -> str:
            lengths.append(len(ids))
            return decode(ids)

    detokenizer = Detokenizer(Counting())  # type: ignore[arg-type]
    ids = list(tokens[run]) * 400
    text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert max(lengths) <= MAX_WINDOW and len(lengths) <= 3 * len(ids)
    assert set(text) <= {"\ufffd"} and len(text) > 100


@pytest.mark.parametrize(("stop", "text", "shown"), [
    ("<user>", "ab<user>cd", "ab"),
    ("<user>", "ab<assistant>cd<user>", "abcd"),
    ("b<user>c", "ab<user>cd", "a"),
    ("b<user>c", "ab<user>d", "abd"),
    ("<user><assistant>", "a<user><user>b<user><assistant>", "ab"),
    ("bc", "ab<user>cd", "a"),
    ("x", "ab<user>cd", "abcd"),
])
def test_stop_strings_name_special_tokens(
    tokenizer: Tokenizer, stop: str, text: str, shown: str,
) -> None:
    stream = TextStream(tokenizer, ["never", stop])
    pieces = list[str]()
    for token in tokenizer.encode(text):
        pieces.append(stream.push(token))
    assert "".join(pieces) + stream.flush() == shown
    assert stream.is_stopped == (text.replace("<assistant>", "").startswith(shown + stop) or
                                 stop in ("bc", "<user><assistant>"))


def test_a_special_token_spelt_out_stops_too(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["<user>"])
    letters = [tokenizer.encode(char)[0] for char in "a<user>b"]
    assert "".join(map(stream.push, letters)) == "a" and stream.is_stopped
