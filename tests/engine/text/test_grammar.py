"""JSON schemas over a byte vocabulary and over nano's: what is allowed, what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import longspan
from longspan.engine.text.grammar import NUM_KEPT, Grammar, Grammars
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import InvalidRequestError
from tests.doubles import write_tokenizer

PERSON: dict[str, Any] = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False, "properties": {
        "name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 99},
        "tags": {"type": "array", "maxItems": 2, "items": {"enum": ["a", "b"]}}}}


@pytest.fixture(scope="module", params=["bytes", "nano"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
) -> Tokenizer:
    if request.param == "nano":
        return Tokenizer(Path(longspan.__file__).parent / "nano")
    path: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size + 5)  # the model's table is padded


def allowed(grammar: Grammar) -> list[int]:
    mask = grammar.mask()
    assert mask is not None
    return [token for token in range(len(mask) * 8) if mask[token // 8] >> token % 8 & 1]


def write(grammar: Grammar, tokenizer: Tokenizer, text: str) -> None:
    for token in tokenizer.encode(text):
        assert token in allowed(grammar), (text, tokenizer.piece(token))
        grammar.push(token)


def may_end(grammar: Grammar, tokenizer: Tokenizer) -> bool:
    found = tokenizer.eos_token_ids & set(allowed(grammar))
    assert found in (frozenset(), tokenizer.eos_token_ids)
    return bool(found)


def test_random_answers_fit_the_schema(grammars: Grammars, tokenizer: Tokenizer) -> None:
    rng, num_whole = random.Random(3), 0
    for _ in range(20):
        grammar, tokens = grammars.start(json.dumps(PERSON)), list[int]()
        while len(tokens) < 300:
            token = rng.choice(allowed(grammar))
            assert token < tokenizer.vocab_size
            if token in tokenizer.eos_token_ids:
                person = json.loads(tokenizer.decode(tokens))
                assert isinstance(person["name"], str) and len(person["name"]) <= 6
                assert person["age"] <= 99
                assert set(person) <= {"name", "age", "tags"}
                assert set(person.get("tags", ())) <= {"a", "b"}
                num_whole += 1
                break
            tokens.append(token)
            grammar.push(token)
    assert num_whole >= 5


def test_the_end_comes_exactly_where_the_text_is_whole(
    grammars: Grammars, tokenizer: Tokenizer,
) -> None:
    grammar = grammars.start(json.dumps(PERSON))
    for piece in ('{"name": "Li"', ', "age"', ': 42', ', "tags": ["a"]'):
        write(grammar, tokenizer, piece)
        assert not may_end(grammar, tokenizer)
    write(grammar, tokenizer, "}")
    assert set(allowed(grammar)) == tokenizer.eos_token_ids


def test_white_space_is_bounded(grammars: Grammars) -> None:
    assert not _fits(grammars, '{"a":  1}')
    assert not _fits(grammars, '{\n' + " " * 17 + '"a": 1}')
    for indent in (None, 2, 4):
        assert _fits(grammars, json.dumps({"a": [1, {"b": "c"}], "d": {}}, indent=indent))
    assert _fits(grammars, '{"a":[1,2]}')


def _fits(grammars: Grammars, text: str) -> bool:
    grammar = grammars.start('{"type": "object"}')
    for token in grammars._tokenizer.encode(text):
        if token not in allowed(grammar):
            return False
        grammar.push(token)
    return True


def test_a_token_that_may_not_come_ends_it(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammars.start('{"type": "object"}')
    grammar.push(tokenizer.encode("x")[0])
    assert grammar.mask() is None


def test_completions_do_not_share_their_place(grammars: Grammars, tokenizer: Tokenizer) -> None:
    one, other = (grammars.start('{"type": "object"}') for _ in range(2))
    write(one, tokenizer, '{"a": 1')
    write(other, tokenizer, "{}")
    assert may_end(other, tokenizer) and not may_end(one, tokenizer)


@pytest.mark.parametrize(("schema", "reason"), [
    ("{", "Expecting property name"),
    ('"object"', "Expecting object schema"),
    ('{"type": "objekt"}', "Invalid type: objekt"),
    ('{"not": {}}', 'Unimplemented keys: ["not"]'),
    ('{"type": "string", "pattern": "(?=a)b"}', "look-around"),
    ('{"$ref": "#/nowhere"}', "Pointer '/nowhere' does not exist"),
    ('{"$ref": "http://127.0.0.1/schema.json"}', "Default retriever does not fetch"),
    ('{"type": "integer", "minimum": 5, "maximum": 3}', "minimum (5) is greater than maximum (3)"),
    ('{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}', ""),
    ('{"properties": {"a":' * 3000 + "{}" + "}}" * 3000, "recursion"),
    (json.dumps({"properties": {f"k{i}": {"type": "string", "format": "uri"} for i in range(900)}}),
     "too big"),
])
def test_what_cannot_be_followed_is_refused_in_one_line(
    grammars: Grammars, schema: str, reason: str,
) -> None:
    with pytest.raises(InvalidRequestError) as error:
        grammars.check(schema)
    message = str(error.value)
    assert message.startswith("json_schema cannot be followed: ")
    assert reason in message and "\n" not in message and len(message) < 400


def test_compiled_schemas_are_kept_up_to_a_limit(grammars: Grammars) -> None:
    for size in range(NUM_KEPT + 9):
        grammars.check(json.dumps({"type": "string", "maxLength": size}))
    assert len(grammars._compiled) == NUM_KEPT


def test_a_checkpoint_without_an_end(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InvalidRequestError, match="names no end-of-text token"):
        Grammars(Tokenizer(tmp_path), 300).check("{}")


@pytest.mark.parametrize("name", ["path", "password", "binary", "uri-reference", "int32", "regex"])
def test_formats_that_nobody_knows_are_annotations(grammars: Grammars, name: str) -> None:
    """Wherever a schema may stand; a property may be called so, and data may look so."""
    text = {"type": "string", "format": name}
    for schema in (text, {"type": "array", "items": text, "prefixItems": [text]},
                   {"anyOf": [text, {"type": "null"}]}, {"$defs": {"a": text}, "$ref": "#/$defs/a"},
                   {"type": "object", "properties": {"a": text, "format": text},
                    "additionalProperties": text},
                   {"const": {"format": name}}, {"enum": [{"format": name}, 1]}):
        grammars.check(json.dumps(schema))


def test_formats_that_are_known_are_followed(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammars.start(json.dumps({"type": "object", "additionalProperties": False,
                                         "properties": {"format": {"const": {"format": "x"}}}}))
    write(grammar, tokenizer, '{"format": {"format": "x"}}')
    assert may_end(grammar, tokenizer)
    grammar = grammars.start('{"type": "string", "format": "date"}')
    write(grammar, tokenizer, '"2')
    assert tokenizer.encode("x")[0] not in allowed(grammar)
