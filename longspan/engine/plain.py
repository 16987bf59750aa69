"""Values that callers give for a request's parameters: made plain Python, and checked. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from longspan.errors import InvalidRequestError

MAX_SCHEMA_CHARS = 65_536


def require(condition: bool, name: str, value: object, wanted: str) -> None:
    """Raise `InvalidRequestError` with the name and the value unless the condition holds."""
    if not condition:
        raise InvalidRequestError(f"{name} is {value!r}; it must be {wanted}")


def as_pairs(
    bias: Mapping[int, float] | Iterable[tuple[int, float]]
) -> tuple[tuple[int, float], ...]:
    """Make pairs of a mapping of token ids. Raises `InvalidRequestError` for anything else."""
    try:
        return tuple((as_plain(token), as_plain(number)) for token, number in dict(bias).items())
    except (TypeError, ValueError):
        raise InvalidRequestError(
            "logit_bias must map token ids to numbers, for example {13: -100}") from None


def as_json(schema: object) -> str | None:
    """Write the schema as text. Raises `InvalidRequestError` for what is no JSON, or too long."""
    if schema is None:
        return None
    try:
        text = str(schema) if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"json_schema is no JSON: {error}") from None
    if len(text) > MAX_SCHEMA_CHARS:
        raise InvalidRequestError(
            f"json_schema has {len(text)} characters; at most {MAX_SCHEMA_CHARS}")
    return text


def as_grammar(grammar: object, json_schema: str | None) -> str | None:
    """Check a grammar's outside. Raises `InvalidRequestError` for what is none, or too long, or
    stands beside a schema."""
    if grammar is None:
        return None
    require(json_schema is None, "grammar", grammar, "None beside json_schema")
    require(is_text(grammar) and str(grammar).startswith("start:"), "grammar", grammar,
            "a grammar in Lark's notation that begins with the rule start")
    text = str(grammar)
    if len(text) > MAX_SCHEMA_CHARS:
        raise InvalidRequestError(
            f"grammar has {len(text)} characters; at most {MAX_SCHEMA_CHARS}")
    return text


def as_plain(value: Any) -> Any:
    """Turn numbers and texts of other classes (numpy's, for example) into Python's own: no other
    class travels between processes."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, Integral) else value


def as_plain_tuple(name: str, values: Any) -> tuple[Any, ...]:
    """Make a tuple of plain values. Raises `InvalidRequestError` for what is no list."""
    try:
        return tuple(map(as_plain, values))
    except TypeError:
        raise InvalidRequestError(f"{name} is {values!r}; it must be a list") from None


def is_text(value: object) -> bool:
    """Tell whether this is a string that is not empty and has no lone surrogates, which no message
    can carry."""
    return isinstance(value, str) and "" != value == value.encode(errors="ignore").decode()


def is_number(value: object) -> bool:
    """Tell whether this is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: object) -> bool:
    """Tell whether this is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)
