"""Formats of tool calls: which one a template means, and grammars that hold answers to tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from longspan.engine.text.call_format import FORMATS, MAX_CALLS, CallFormat, find_format
from longspan.engine.text.grammar import Grammar, Grammars
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import InvalidRequestError
from tests.doubles import write_tokenizer

HERMES, LLAMA = FORMATS
CITY: dict[str, Any] = {
    "type": "object", "required": ["city"], "additionalProperties": False,
    "properties": {"city": {"$ref": "#/$defs/City"}, "at": {"type": "string", "format": "path"}},
    "$defs": {"City": {"enum": ["Paris", "Rome"]}}}
TOOLS = {"weather": CITY, "say": {"type": "object", "properties": {"x": {"type": "integer"}},
                                  "additionalProperties": False}}
WEATHER = '{"name": "weather", "%s": {"city": "Rome"}}'
SAY = '{"name": "say", "%s": {"x": 1}}'


@pytest.mark.parametrize(("template", "name"), [
    ("{% if tools %}<tool_call>{% endif %}", "hermes"), ("<tool_call>", None),
    ('{{ tools }}{"name": function name, "parameters": dictionary of argument name}', "llama"),
    ("{{ tools }}<|python_tag|>", "llama"), ("{{ tools }}[TOOL_CALLS]", None),
    ("{{ tools }}<tool_call>\n<function=x>", None), ("{{ messages }}", None)])
def test_which_format_a_template_means(template: str, name: str | None) -> None:
    found = find_format(template, lambda text: None, {})
    assert (found.name if found else None) == name


def test_marks_that_are_no_part_of_the_text_cannot_be_read() -> None:
    ids = {"<tool_call>": 7, "</tool_call>": 8}
    assert find_format("tools <tool_call>", ids.get, {7: "<tool_call>"}) is None
    found = find_format("tools <tool_call>", ids.get, {})
    assert found is not None and (found.begin_id, found.end_id) == (7, 8)


@pytest.fixture(scope="module", params=["text", "tokens"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
) -> Tokenizer:
    """A byte vocabulary, with and without tokens for the marks."""
    path: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, chat_template="{{ tools }}<tool_call>")
    if request.param == "tokens":
        backend = Backend.from_file(str(path / "tokenizer.json"))
        backend.add_tokens([AddedToken(text, special=False)
                            for text in ("<tool_call>", "</tool_call>")])
        backend.save(str(path / "tokenizer.json"))
    return Tokenizer(path)


def fits(tokenizer: Tokenizer, grammar: str, text: str) -> bool | None:
    """Whether a text is a whole answer; None if it is the beginning of one."""
    started = Grammars(tokenizer, tokenizer.vocab_size).start(grammar)
    for token in tokenizer.encode(text):
        if not may_come(started, token):
            return False
        started.push(token)
    return any(may_come(started, token) for token in tokenizer.eos_token_ids) or None


def may_come(grammar: Grammar, token: int) -> bool:
    mask = grammar.mask()
    assert mask is not None
    return bool(mask[token // 8] >> token % 8 & 1)


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call % 'arguments'}\n</tool_call>" for call in calls)


def test_calls_are_held_to_their_schemas(tokenizer: Tokenizer) -> None:
    form = tokenizer.call_format
    assert form is not None and (form.begin_id is None) == (tokenizer.vocab_size == 259)
    grammar = form.grammar(TOOLS)
    assert fits(tokenizer, grammar, hermes(WEATHER)) and fits(tokenizer, grammar, hermes(SAY))
    assert fits(tokenizer, grammar, hermes(WEATHER, SAY, WEATHER))
    assert fits(tokenizer, grammar, hermes(*[SAY] * MAX_CALLS))
    assert fits(tokenizer, grammar, hermes(*[SAY] * (MAX_CALLS + 1))) is False
    assert fits(tokenizer, grammar, hermes(WEATHER)[:-3] if form.end_id is None else
                hermes(WEATHER)[:-12]) is None
    for wrong in ("Hello", hermes(WEATHER.replace("Rome", "Oslo")), "", hermes("{}%.0s"),
                  hermes(WEATHER.replace("weather", "nothing")), hermes(SAY) + " and"):
        assert not fits(tokenizer, grammar, wrong), wrong


def test_one_tool_by_name(tokenizer: Tokenizer) -> None:
    form = tokenizer.call_format
    assert form is not None
    grammar = form.grammar({"say": TOOLS["say"]}, is_single=True)
    assert fits(tokenizer, grammar, hermes(SAY))
    assert not fits(tokenizer, grammar, hermes(SAY, SAY))


def test_calls_or_an_answer_of_a_schema(tokenizer: Tokenizer) -> None:
    form = tokenizer.call_format
    assert form is not None
    grammar = form.grammar(TOOLS, answer={"type": "object", "required": ["a"], "properties": {
        "a": {"type": "integer"}}, "additionalProperties": False})
    assert fits(tokenizer, grammar, hermes(SAY)) and fits(tokenizer, grammar, '{"a": 5}')
    assert not fits(tokenizer, grammar, '{"b": 5}')


def test_llama_writes_calls_without_marks(tokenizer: Tokenizer) -> None:
    grammar = LLAMA.grammar(TOOLS)
    call = WEATHER % "parameters"
    assert fits(tokenizer, grammar, call) and fits(tokenizer, grammar, f"{call}; {call}")
    assert not fits(tokenizer, grammar, WEATHER % "arguments")


def test_names_and_schemas_with_nasty_texts(tokenizer: Tokenizer) -> None:
    form = CallFormat(name="x", signs=(), begin="", end="", separator=";", key="arguments")
    schema = {"type": "object", "properties": {'a"\\n %json {': {"const": "é\n"}},
              "additionalProperties": False}
    grammar = form.grammar({"a.b/c:d-é": schema})
    text = '{"name": "a.b/c:d-é", "arguments": ' + json.dumps(
        {'a"\\n %json {': "é\n"}, ensure_ascii=False) + "}"
    assert fits(tokenizer, grammar, text)


def test_schemas_of_tools_that_cannot_be_followed(tokenizer: Tokenizer) -> None:
    grammar = HERMES.grammar({"f": {"type": "object", "not": {"type": "string"}}})
    with pytest.raises(InvalidRequestError, match="the grammar cannot be followed: .*not"):
        Grammars(tokenizer, tokenizer.vocab_size).check(grammar)
