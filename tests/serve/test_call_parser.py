"""Tool calls in answers: whole and in pieces of any size, in both formats, and what only looks like
one."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest

from longspan.engine.text.call_format import FORMATS
from longspan.serve.call_parser import Argued, Called, CallParser, Said

HERMES, LLAMA = FORMATS
NAMES = ("weather", "f", "g")
Read = tuple[str, list[tuple[str, str]]]


def read(name: str, pieces: Sequence[str]) -> Read:
    """The text, and name and arguments of each call."""
    parser = CallParser({"hermes": HERMES, "llama": LLAMA}[name], NAMES)
    said, calls = "", list[list[str]]()
    for place, text in enumerate(pieces):
        for piece in parser.push(text, is_last=place == len(pieces) - 1):
            if isinstance(piece, Said):
                said += piece.text
            elif isinstance(piece, Called):
                assert piece.index == len(calls)
                calls.append([piece.name, ""])
            else:
                assert isinstance(piece, Argued)
                calls[piece.index][1] += piece.text
    assert parser.num_calls == len(calls)
    return said, [(name, arguments) for name, arguments in calls]


WEATHER = '{"name": "weather", "arguments": {"city": "Paris"}}'
NASTY = '{"a": "}\\" </tool_call> {", "b": [{"c": "\\\\"}], "é": {}}'
CASES: list[tuple[str, str, Read]] = [
    ("hermes", "Hello.", ("Hello.", [])),
    ("hermes", "  Hello \n", ("  Hello \n", [])),
    ("hermes", "", ("", [])),
    ("hermes", f"<tool_call>\n{WEATHER}\n</tool_call>", ("", [("weather", '{"city": "Paris"}')])),
    ("hermes", f"Let me see.\n<tool_call>\n{WEATHER}\n</tool_call>",
     ("Let me see.", [("weather", '{"city": "Paris"}')])),
    ("hermes", f"<tool_call>{WEATHER}</tool_call>\n<tool_call>\n{WEATHER}\n</tool_call>\n",
     ("", [("weather", '{"city": "Paris"}')] * 2)),
    ("hermes", f"<tool_call>{WEATHER}</tool_call> And <b>", (" And <b>", [
        ("weather", '{"city": "Paris"}')])),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": ' + NASTY + "}\n</tool_call>",
     ("", [("f", NASTY)])),
    ("hermes", '<tool_call>{ "name" : "f",\n"parameters" :{}}</tool_call>', ("", [("f", "{}")])),
    ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>',
     ("", [("f", '{"x": 1}')])),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', ("", [("f", "{}")])),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', ("", [("f", "{}")])),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>',
     ("", [("f", '{"x": 1}')])),
    ("hermes", "<tool_call>what</tool_call>!", ("<tool_call>what</tool_call>!", [])),
    ("hermes", '<tool_call>{"name": "\\q", "arguments": {}}</tool_call>',
     ('<tool_call>{"name": "\\q", "arguments": {}}</tool_call>', [])),
    ("hermes", "a < b and <tool", ("a < b and <tool", [])),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"x": [1', ("", [("f", '{"x": [1')])),
    ("hermes", '<tool_call>\n{"name": "f', ('<tool_call>\n{"name": "f', [])),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}', ("", [("f", "{}")])),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
     ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', [])),
    ("hermes", WEATHER, ("", [("weather", '{"city": "Paris"}')])),
    ("hermes", f"\n {WEATHER}\n", ("", [("weather", '{"city": "Paris"}')])),
    ("hermes", '{"arguments": {"x": 1}, "name": "f"}', ("", [("f", '{"x": 1}')])),
    ("hermes", '{"name": "nobody", "arguments": {}}',
     ('{"name": "nobody", "arguments": {}}', [])),
    ("hermes", '{"answer": 42} <tool_call>', ('{"answer": 42} <tool_call>', [])),
    ("hermes", '{"name": "f', ('{"name": "f', [])),
    ("llama", '{"name": "nobody", "parameters": {}}', ('{"name": "nobody", "parameters": {}}', [])),
    ("llama", "Hello {x}.", ("Hello {x}.", [])),
    ("llama", '{"name": "f", "parameters": {"x": {"y": 1}}}', ("", [("f", '{"x": {"y": 1}}')])),
    ("llama", ' {"name": "f", "parameters": {}}; {"name": "g", "parameters": {"x": 2}}\n',
     ("", [("f", "{}"), ("g", '{"x": 2}')])),
    ("llama", '{"answer": 42}', ('{"answer": 42}', [])),
    ("llama", '{"answer": "' + "x" * 900 + '"}', ('{"answer": "' + "x" * 900 + '"}', [])),
]


@pytest.mark.parametrize("place", range(len(CASES)))
def test_whole_and_in_pieces(place: int) -> None:
    name, text, expected = CASES[place]
    assert read(name, [text]) == expected
    assert read(name, [*text, ""]) == expected
    rng = random.Random(place)
    for _ in range(20):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 6)))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(name, pieces) == expected, pieces


def test_names_and_arguments_come_while_they_are_written() -> None:
    parser = CallParser(HERMES, NAMES)
    assert parser.push('<tool_call>\n{"name": "f", "arguments": {') == [
        Called(0, "f"), Argued(0, "{")]
    assert parser.push('"city": "Pa') == [Argued(0, '"city": "Pa')]
    assert parser.push('ris"}') == [Argued(0, 'ris"}')]
    assert parser.push("}\n</tool_call>") == []


def test_text_before_a_call_comes_at_once() -> None:
    parser = CallParser(HERMES, NAMES)
    assert parser.push("Let me") == [Said("Let me")]
    assert parser.push(" see <b") == [Said(" see <b")]
    assert parser.push("\n<tool") == []  # white space and what may be a mark wait
    assert parser.push("box>") == [Said("\n<toolbox>")]


def test_random_text_is_never_lost() -> None:
    rng = random.Random(11)
    parts = ["<tool_call>", "</tool_call>", "{", "}", '"name"', ": ", '"f"', ", ", '"arguments"',
             "x", "\n", "[", '\\"', "é"]
    for _ in range(500):
        text = "".join(rng.choices(parts, k=rng.randint(1, 20)))
        whole = read("hermes", [text])
        assert read("hermes", [*text, ""]) == whole, text
        if not whole[1]:
            assert whole[0].split() == text.split()
        for _, arguments in whole[1]:
            assert not arguments or arguments[0] in "{[x" or json.loads(arguments) is not None
