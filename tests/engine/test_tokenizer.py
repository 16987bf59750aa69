"""Tokenizer: round trips, chat templates, incremental text and stop strings."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from longspan.engine.tokenizer import Detokenizer, StopMatcher, TextStream, Tokenizer
from longspan.errors import CheckpointError, InvalidRequestError
from tests.doubles import write_tokenizer

TEXTS = ["plain", "naïve café", "长文本 和 汉字", "🙂👩‍👩‍👧 emoji", "a\nb\t c  ", "\ufffd real"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    assert len(token_ids) == len(text.encode())
    assert tokenizer.decode(token_ids) == text


def test_special_tokens_are_recognised_and_left_out_of_text(tokenizer: Tokenizer) -> None:
    assert list(tokenizer.encode("<end>")) == [256]
    assert tokenizer.decode([256, *tokenizer.encode("a"), 257]) == "a"
    assert tokenizer.eos_token_ids == {256}
    assert tokenizer.vocab_size == 259


def test_end_tokens_come_from_the_generation_config_too(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert Tokenizer(tmp_path).eos_token_ids == {3, 4, 5, 256}


def test_truncation_in_the_file_is_ignored_and_special_tokens_are_a_choice(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["truncation"] = {
        "max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    raw["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "<user>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<user>": {"id": "<user>", "ids": [257], "tokens": ["<user>"]}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer(tmp_path)
    assert len(tokenizer.encode("x" * 9)) == 10 and tokenizer.encode("x")[0] == 257
    assert len(tokenizer.encode("x" * 9, add_special_tokens=False)) == 9


def test_faulty_checkpoints_are_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json there"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a valid tokenizer"):
        Tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        Tokenizer(tmp_path)


def test_text_that_is_not_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        tokenizer.encode("lone \ud800 surrogate")


# -- chat template ---------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_renders_the_template(tokenizer: Tokenizer) -> None:
    assert tokenizer.render_chat(MESSAGES) == "<user>Hi<end><assistant>"
    assert tokenizer.render_chat(MESSAGES, add_generation_prompt=False) == "<user>Hi<end>"


@pytest.mark.parametrize(("messages", "reason"), [
    ([], "there are no messages"),
    (["Hi"], "must be an object with a role"),
    ([{"content": "Hi"}], "must be an object with a role"),
    ([{"role": "wizard", "content": "Hi"}], "unknown role wizard"),
])
def test_refuses_messages(
    tokenizer: Tokenizer, messages: list[dict[str, str]], reason: str,
) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        tokenizer.render_chat(messages)


@pytest.mark.parametrize(("template", "expected"), [
    ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
    ("{{ eos_token }}{{ bos_token }}", "<end>"),
    ("{% for m in messages %}{% break %}{% endfor %}x", "x"),
    ("{{ strftime_now('%Y') | length }}", "4"),
    ("  {% if true %}\n  y\n  {% endif %}", "  y\n"),
])
def test_template_environment(tmp_path: Path, template: str, expected: str) -> None:
    write_tokenizer(tmp_path, chat_template=template)
    assert Tokenizer(tmp_path).render_chat(MESSAGES) == expected


@pytest.mark.parametrize("template", [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ 1 / 0 }}",
    "{{ messages | nosuchfilter }}",
])
def test_hostile_or_broken_templates_end_in_one_line(tmp_path: Path, template: str) -> None:
    write_tokenizer(tmp_path, chat_template=template)
    with pytest.raises((InvalidRequestError, CheckpointError)) as error:
        Tokenizer(tmp_path).render_chat(MESSAGES)
    assert "\n" not in str(error.value)


def test_template_sources(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(InvalidRequestError, match="has no chat template"):
        Tokenizer(tmp_path).render_chat(MESSAGES)
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert Tokenizer(tmp_path).render_chat(MESSAGES) == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer(tmp_path).render_chat(MESSAGES) == "file"


# -- incremental text ------------------------------------------------------------------------------


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
