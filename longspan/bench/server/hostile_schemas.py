"""JSON schemas that want to do harm: what takes much of a compiler without limits, or may take much
of another one. For tests and measurements of servers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]
TEXT = {"type": "string", "pattern": "^a+$"}


def doubled(num_levels: int, join: Callable[[Schema], Schema]) -> Schema:
    """Refer at each level to the next one as often as ``join`` says."""
    levels = {f"d{i}": join({"$ref": f"#/$defs/d{i + 1}"}) for i in range(num_levels)}
    return {"$defs": {**levels, f"d{num_levels}": TEXT}, "$ref": "#/$defs/d0"}


def nested(depth: int, wrap: Callable[[Schema], Schema]) -> Schema:
    """Wrap a schema so many times."""
    schema: Schema = TEXT
    for _ in range(depth):
        schema = wrap(schema)
    return schema


def inside(schema: Schema) -> Schema:
    """Make an object that must have it."""
    return {"type": "object", "required": ["a"], "properties": {"a": schema}}


def patterns(*texts: str) -> list[Schema]:
    """Make strings of these patterns."""
    return [{"type": "string", "pattern": text} for text in texts]


def hostile() -> Iterator[Schema]:
    """Make them, one after the other."""
    joins: list[Callable[[Schema], Schema]] = [
        lambda ref: {"allOf": [ref, ref]}, lambda ref: {"anyOf": [ref, ref]},
        lambda ref: {"oneOf": [ref, ref]}, lambda ref: {"properties": {"a": ref, "b": ref}},
        lambda ref: {"items": ref, "prefixItems": [ref, ref]},
        lambda ref: {"allOf": [{"properties": {"a": ref}}, {"properties": {"a": ref}}]}]
    for join in joins:
        yield doubled(12, join)
        yield doubled(30, join)
    yield doubled(18, joins[0])
    yield inside(doubled(0, joins[0]) | doubled(30, joins[0]))
    for size in (10**5, 10**9):
        yield {"type": "array", "items": TEXT, "minItems": size, "maxItems": size}
        yield {"type": "string", "minLength": size}
        yield {"type": "string", "maxLength": size}
    yield {"enum": [f"value {i} of {i * 7919}" for i in range(2500)]}
    yield {"const": "x" * 60_000}
    yield {"const": {f"k{i}": list(range(20)) for i in range(500)}}
    yield {"properties": {f"k{i}": {"type": "string"} for i in range(2000)}}
    yield {"properties": {f"k{i}": {"type": "string", "format": "uri"} for i in range(900)}}
    for regex in ("((((a{1,100}){1,100}){1,100}){1,100}){1,100}", "(a|b)*a(a|b){200}",
                  "(([a-z]+)*)*x" * 50, "^(.*a.{200}|.*b.{300}|.*c.{400}).*$", "^(a?){300}a{300}$",
                  r"^(\p{L}.{100}|\w.{99}|\p{Lu}.*\d.{98}){50}$"):
        yield inside(*patterns(regex))
    yield {"allOf": patterns(*(f"^(.*a.{{{i}}})*$" for i in range(2, 30)))}
    yield {"patternProperties": {f"^.*a.{{{i}}}$": TEXT for i in range(30)}}
    yield {"patternProperties": {f"^k{i}x": TEXT for i in range(1000)}}
    yield {"allOf": [{"anyOf": patterns(f"^{i}.*", f".*{i}$")} for i in range(10)]}
    yield {"allOf": [{"anyOf": patterns(f"^{i}.*", f".*{i}$")} for i in range(30)]}
    yield {"type": "integer", "multipleOf": 9_999_991}
    yield inside({"type": "integer", "multipleOf": 9_999_991})
    yield {"type": "integer", "minimum": -10**300, "maximum": 10**300}
    yield {"type": "number", "minimum": 1e-300, "maximum": 1.7e308, "multipleOf": 1e-7}
    loop = {"$ref": "#/$defs/a"}
    yield {"$defs": {"a": loop}, **loop}
    yield {"$defs": {"a": {"allOf": [loop, loop]}}, **loop}
    yield {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}
    yield {"$defs": {"a": {"properties": {"a": {"allOf": [loop, inside(loop)]}}}}, **loop}
    yield nested(100, lambda inner: {"type": "array", "items": inner})
    yield nested(9, lambda inner: {"anyOf": [inner, inside(inner)]})
    yield nested(100, lambda inner: {"allOf": [inner]})


HOSTILE: tuple[str, ...] = (
    *map(json.dumps, hostile()), '{"items":' * 6000 + "{}" + "}" * 6000,
    '{"allOf":[' * 6000, "[" * 60_000)
"""JSON texts; the last three are no schemas, or none that a parser can follow."""
