"""Tokenizer: round trips and chat templates."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import longspan
from longspan.engine.text import chat_template
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import CheckpointError, InvalidRequestError
from tests.doubles import begin_texts_with, write_tokenizer

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
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    begin_texts_with(tmp_path, "<user>", 257)
    tokenizer = Tokenizer(tmp_path)
    whole = tokenizer.encode("x" * 9, add_special_tokens=True)
    assert len(whole) == 10 and whole[0] == 257
    assert list(tokenizer.encode("x" * 9)) == list(whole[1:])


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


def test_contents_may_come_in_parts(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "<end>"}]
    messages = [{"role": "user", "content": parts}]
    assert tokenizer.render_chat(messages) == "<user>a\n<end><end><assistant>"
    assert list(tokenizer.encode_chat(messages)).count(256) == 1
    for wrong in (["a"], [{"type": "image_url", "image_url": {}}], [{"type": "text"}]):
        with pytest.raises(InvalidRequestError, match="each part of a content"):
            tokenizer.encode_chat([{"role": "user", "content": wrong}])


@pytest.mark.parametrize("begun", ["Sure: ", "<end>", "line\n", " {"])
def test_the_last_message_is_continued(tokenizer: Tokenizer, begun: str) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": begun}]
    ids = tokenizer.encode_chat(messages, continue_final_message=True)
    text = tokenizer.decode(ids, with_special=True)
    assert text == "<user>Hi<end><assistant>" + begun and list(ids).count(256) == 1


def test_what_cannot_be_continued(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for last in ({"role": "user", "content": "x"}, {"role": "assistant", "content": None}):
        with pytest.raises(InvalidRequestError, match="role assistant and some text"):
            tokenizer.encode_chat([*MESSAGES, last], continue_final_message=True)
    write_tokenizer(tmp_path, chat_template="{{ messages[0].content }}")
    with pytest.raises(InvalidRequestError, match="leaves it out"):
        Tokenizer(tmp_path).encode_chat(
            [*MESSAGES, {"role": "assistant", "content": "x"}], continue_final_message=True)


@pytest.mark.parametrize(("template", "expected"), [
    ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
    ("{{ eos_token }}{{ bos_token }}", "<end>"),
    ("{% for m in messages %}{% break %}{% endfor %}x", "x"),
    ("{{ strftime_now('%Y') | length }}", "4"),
    ("  {% if true %}\n  y\n  {% endif %}", "  y\n"),
    ("{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}"
     "{%- endgeneration %}{{ x }}{% endfor %}.", "Hi."),
    ("{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, separators=(',', ':')) }}",
     '{"a":"é","b":1}'),
    ("{% for m in messages * 3 %}{{ loop.index }}{{ loop.last }}/{{ loop.length }} {% else %}x"
     "{% endfor %}{% for m in none_such %}y{% else %}z{% endfor %}",
     "1False/3 2False/3 3True/3 z"),
    ("{% for m in [1, [2, 3]] recursive %}{{ loop(m) if m is sequence else m }}{% endfor %}",
     "123"),
    ("{% set x %}{{ 'a' ~ 1 }}b{% endset %}{{ x | upper }}{{ 'a' | center(5) | length }}", "A1B5"),
    ("{% set x | upper %}ab{% endset %}{{ x }}{{ '%s-%s' % (1, 2) }}{{ 2 ** 10 * 3 }}",
     "AB1-23072"),
    ("{% macro m(a) %}<{{ a }}{{ caller() }}>{% endmacro %}{% call m(10 ** 12) %}c{% endcall %}",
     "<1000000000000c>"),
])
def test_template_environment(tmp_path: Path, template: str, expected: str) -> None:
    write_tokenizer(tmp_path, chat_template=template)
    assert Tokenizer(tmp_path).render_chat(MESSAGES) == expected


@pytest.mark.parametrize("template", [
    "{{ messages[0].content + 1 }}", "{{ no_such_function() }}", "{{ messages[9].content.x }}",
    "{% include '/etc/hostname' %}", "{{ raise_exception('never') }}",
])
def test_a_template_that_always_fails_is_found_when_it_is_loaded(
    tmp_path: Path, template: str,
) -> None:
    write_tokenizer(tmp_path, chat_template=template)
    with pytest.raises(CheckpointError, match="fails with any conversation") as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("needs", ["messages[0].role == 'system'", "messages | length > 2"])
def test_a_template_may_want_more_than_one_message(tmp_path: Path, needs: str) -> None:
    write_tokenizer(tmp_path, chat_template="{% if not (" + needs + ") %}{{ raise_exception('no') "
                    "}}{% endif %}ok")
    with pytest.raises(InvalidRequestError, match="refuses these messages: no") as error:
        Tokenizer(tmp_path).render_chat(MESSAGES)
    assert str(tmp_path) not in str(error.value)


def test_template_values_may_have_any_name(tokenizer: Tokenizer) -> None:
    names = ("self", "messages", "text", "values", "loop", "raise_exception")
    assert tokenizer.render_chat(MESSAGES, **dict.fromkeys(names, 1)).startswith("<user>Hi")
    options: dict[str, Any] = dict.fromkeys(names, 1)
    assert tokenizer.encode_chat(MESSAGES, **options)


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


GROWING = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "product": "{{ 'x' * 10**9 }}",
    "product of products": "{% set x = 'x' * 10**4 %}{{ x * 10**4 * 10**4 }}",
    "list": "{{ ([0] * 10**9) | length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}"
               "{% endfor %}",
    "center": "{{ 'x' | center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "indent": "{{ 'x' | indent(10**9, true) }}",
    "sum": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}"
           "{% endfor %}",
    "tilde": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
             "{% endfor %}",
    "join": "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
            "{% set n.x = [n.x, n.x] | join %}{% endfor %}",
    "block": "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
             "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "macro": "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='ab') %}"
             "{% for i in range(99) %}{% set n.x = twice(n.x) %}{% endfor %}",
    "output": "{% set x = 'x' * 10**6 %}{% for i in range(99) %}{{ x }}{% endfor %}",
    "loops": "{% for a in range(10**5) %}{% for b in range(10**5) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
}


@pytest.mark.parametrize("name", GROWING)
def test_a_template_without_bounds_is_found_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.3)
    write_tokenizer(tmp_path, chat_template=GROWING[name])
    started_s = time.thread_time()
    with pytest.raises(CheckpointError, match=r"the chat template (makes|takes|recurses)") as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert time.thread_time() - started_s < 3


@pytest.mark.parametrize("name", GROWING)
def test_messages_that_drive_a_template_beyond_its_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.3)
    macros, _, rest = GROWING[name].rpartition("{% endmacro %}")  # are defined outside of blocks
    write_tokenizer(tmp_path, chat_template=macros + ("{% endmacro %}" if macros else "") +
                    "{% if messages[0].content == 'more' %}" + rest + "{% endif %}ok")
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.render_chat(MESSAGES) == "ok"
    with pytest.raises(InvalidRequestError, match=r"template (makes|takes|recurses)") as error:
        tokenizer.render_chat([{"role": "user", "content": "more"}])
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)
    assert tokenizer.render_chat(MESSAGES) == "ok"


def test_a_long_conversation_is_within_the_bounds() -> None:
    nano = Tokenizer(Path(longspan.__file__).parent / "nano")
    messages = [{"role": role, "content": "word " * 1000} for role in ("user", "assistant")] * 500
    assert len(nano.render_chat(messages)) > 5_000_000


@pytest.mark.parametrize("source", [
    "{% for m in messages %}", "{{ x | nosuchfilter }}", "{% generation %}", "{{" + "(" * 5000,
])
def test_invalid_templates_are_found_when_they_are_loaded(tmp_path: Path, source: str) -> None:
    write_tokenizer(tmp_path, chat_template=source)
    with pytest.raises(CheckpointError, match="not valid jinja"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("value", [
    [{"name": "default"}], [{"template": "t"}], ["default"], [["name", "template"]], {"a": "b"}, 5,
    [{"name": "default", "template": 5}], [{"name": ["default"], "template": "t"}],
])
def test_chat_templates_of_another_shape(tmp_path: Path, value: object) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(CheckpointError, match="chat_template in tokenizer_config.json"):
        Tokenizer(tmp_path)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer(tmp_path)


def test_template_sources(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(InvalidRequestError, match="has no chat template") as error:
        Tokenizer(tmp_path).render_chat(MESSAGES)
    assert str(tmp_path) not in str(error.value)
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert Tokenizer(tmp_path).render_chat(MESSAGES) == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer(tmp_path).render_chat(MESSAGES) == "file"
