"""Long token lists of request bodies, decoded in pieces."""

from __future__ import annotations

import asyncio
import json
from array import array
from typing import Any

import pytest

from longspan.serve import long_lists
from longspan.serve.body import parse, parse_aside
from longspan.serve.errors import ApiError
from longspan.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest

IDS = [(7 * n) % 2048 for n in range(120_000)]
LONG = json.dumps(IDS)


def parsed(kind: type[Any], body: bytes) -> Any:
    return asyncio.run(parse_aside(kind, body))


def refusal(kind: type[Any], body: bytes, parser: Any) -> tuple[int, str]:
    with pytest.raises(ApiError) as error:
        parser(kind, body)
    return error.value.status, str(error.value)


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\n\t", " : ")])
def test_the_same_request(separators: tuple[str, str]) -> None:
    body = json.dumps(
        {"model": "nano", "prompt": IDS, "max_tokens": 7}, separators=separators).encode()
    found = parsed(CompletionRequest, body)
    assert found == parse(CompletionRequest, body)
    assert found.prompt == [array("i", IDS)] and found.max_tokens == 7
    tokens = parsed(DetokenizeRequest, json.dumps({"tokens": IDS}, separators=separators).encode())
    assert tokens.tokens == array("i", IDS)


def test_pieces_are_short() -> None:
    """So that others get their turn between them."""
    sizes = []
    decoder = long_lists._ids

    class Watched:
        def decode(self, text: bytes) -> list[int]:
            sizes.append(len(text))
            return decoder.decode(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_lists, "_ids", Watched())
        body, found = long_lists.take_out(b'{"prompt": ' + LONG.encode() + b"}")
    assert found["prompt"] == array("i", IDS) and json.loads(body) == {"prompt": [0]}
    assert len(sizes) > 5 and max(sizes) < 1.1 * long_lists.PIECE_BYTES


@pytest.mark.parametrize("text", [
    LONG[:-1] + ",-1]", LONG[:-1] + ",1.5]", LONG[:-1] + ",true]", LONG[:-1] + ',"a"]',
    LONG[:-1] + f",{2**31}]", LONG[:-1] + f",{2**70}]", LONG[:-1] + ",]", LONG[:-1] + ",,1]",
    LONG[:-1], "[" + LONG + ",3]", LONG.replace(" ", "", 40_000).replace(",5", ";5", 1),
], ids=["negative", "float", "bool", "text", "large", "huge", "comma", "commas", "open", "mixed",
        "semicolon"])
def test_refusals_are_those_of_short_lists(text: str) -> None:
    body = f'{{"model": "nano", "prompt": {text}}}'.encode()
    wanted = refusal(CompletionRequest, body, parse)
    assert wanted[0] == 400 and refusal(CompletionRequest, body, parsed) == wanted


def test_what_has_no_place_is_named() -> None:
    body = json.dumps({"model": "nano", "messages": [{"role": "user", "content": "x"}],
                       "prompt": IDS}).encode()
    assert "prompt" in refusal(ChatRequest, body, parsed)[1]
    body = f'{{"model": "nano", "prompt": {LONG}, "wrong": 1}}'.encode()
    assert "wrong" in refusal(CompletionRequest, body, parsed)[1]


def test_text_and_lists_of_lists_are_left_alone() -> None:
    for prompt in ("word " * 80_000, [IDS, IDS]):
        body = json.dumps({"model": "nano", "prompt": prompt}).encode()
        assert long_lists.take_out(body) == (body, {})
        assert parsed(CompletionRequest, body) == parse(CompletionRequest, body)
