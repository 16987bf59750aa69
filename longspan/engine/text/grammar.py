"""JSON schemas and grammars over a checkpoint's tokens, by the llguidance library. No torch.

A grammar says which tokens may come next; it is told each token that did. Compiling one takes a
millisecond or so for an ordinary schema. The library counts the work of each mask and gives up at a
limit, the same on every machine. It does not count all of compiling: a stranger's schema is checked
within limits first (`longspan.engine.processes.schema_checker`).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Any

from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import InvalidRequestError, LongspanError, MissingDependencyError

GRAMMAR_START = "start:"
"""Beginning of constraints that are no JSON schemas."""
NUM_KEPT = 64
"""Compiled schemas that are kept: clients send the same few again and again."""
# One line with single spaces, or indented lines. Not more: small models that may repeat white space
# produce little else.
JSON_STYLE = {"whitespace_pattern": r"\x20|\x0A\x20{0,16}"}
LIMITS = {"initial_lexer_fuel": 100_000, "max_grammar_size": 50_000, "max_lexer_states": 100_000,
          "verbose_errors": False}
FORMATS = frozenset({"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6",
                     "uuid", "uri"})
"""Formats of strings that the library follows."""
NAMED_SUBSCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions",
                              "dependentSchemas"})
"""Keywords that hold schemas by name."""
SUBSCHEMAS = frozenset({"items", "prefixItems", "additionalItems", "additionalProperties", "allOf",
                        "anyOf", "oneOf", "not", "if", "then", "else", "contains", "propertyNames",
                        "unevaluatedItems", "unevaluatedProperties"})
"""Keywords that hold a schema or a list of them. Others, such as ``const``, hold data."""


class Grammar:
    """What one completion may look like, from its first token to its end."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def push(self, token_id: int) -> None:
        """Advance by the completion's next token."""
        self._matcher.consume_token(token_id)

    def mask(self) -> bytes | None:
        """Return the tokens that may come next, one bit for each id, lowest bit first, in
        little-endian words of 32 bits. End-of-text tokens are among them exactly where the text is
        complete. None: it cannot go on (a limit of the library was met, or a token was pushed
        that may not come)."""
        if self._matcher.is_error():
            return None
        mask: bytes = self._matcher.compute_bitmask()
        return None if self._matcher.is_error() else mask


class Grammars:
    """Compiles schemas for one tokenizer. Safe to use from several threads.

    Args:
        vocab_size: tokens that the model's logits cover; the tokenizer may know fewer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def check(self, constraint: str) -> None:
        """Raise `InvalidRequestError` for what cannot be followed, with the reason;
        `MissingDependencyError` without the library.

        Args:
            constraint: JSON text of a schema, or a grammar in Lark's notation, with a rule on each
                line and the rule ``start`` first.
        """
        self._compile(constraint)

    def start(self, constraint: str) -> Grammar:
        """Return a grammar at its beginning. Raises as `check`."""
        return Grammar(self._compile(constraint))

    def _compile(self, constraint: str) -> Any:
        """Return a matcher of one's own. Nobody waits while another constraint is compiled."""
        with self._lock:
            matcher = self._compiled.get(constraint)
        if matcher is None:
            matcher = self._build(constraint)
        with self._lock:
            self._compiled[constraint] = matcher
            self._compiled.move_to_end(constraint)
            while len(self._compiled) > NUM_KEPT:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()

    def _build(self, constraint: str) -> Any:
        library = _library()
        vocabulary = self.load()
        try:
            source = self._source(library, constraint)
        except (ValueError, RecursionError) as error:
            raise _refused(constraint, error) from None
        matcher = library.LLMatcher(
            vocabulary, source, log_level=0, limits=library.LLParserLimits(**LIMITS))
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first takes longest: it builds tables that are kept
        if matcher.is_error():
            raise _refused(constraint, matcher.get_error())
        return matcher

    def _source(self, library: Any, constraint: str) -> str:
        if not constraint.startswith(GRAMMAR_START):
            schema = json.dumps(_with_known_formats(json.loads(constraint)))
            return str(library.LLMatcher.grammar_from_json_schema(schema, defaults=JSON_STYLE))
        rules = [_with_styled_schema(line) for line in constraint.split("\n")]
        return str(library.LLMatcher.grammar_from_lark("\n".join(rules)))

    def load(self) -> Any:
        """Read the vocabulary for the library now, rather than with the first schema. Raises as
        `check`, and `LongspanError` for a tokenizer that the library cannot use."""
        with self._loading:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
            return self._vocabulary

    def _read_vocabulary(self) -> Any:
        library = _library()
        ends = sorted(self._tokenizer.eos_token_ids)
        if not ends:
            raise InvalidRequestError(
                "json_schema cannot be followed: this checkpoint names no end-of-text token")
        try:
            return library.LLTokenizer(
                self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=ends,
                slices=library.LLTokenizer.json_slices())
        except ValueError as error:
            raise LongspanError(
                f"json_schema cannot be followed with this checkpoint's tokenizer: "
                f"{_first_line(error)}") from None


def _with_styled_schema(rule: str) -> str:
    """Write the schema of one of a grammar's rules as those that stand alone are written."""
    head, has_schema, rest = rule.partition(" %json ")
    if not has_schema:
        return rule
    schema, end = json.JSONDecoder().raw_decode(rest)
    styled = {**_with_known_formats(schema), "x-guidance": JSON_STYLE}
    return f"{head} %json {json.dumps(styled)}{rest[end:]}"


def _with_known_formats(schema: Any) -> Any:
    """Return a schema without the formats that the library does not know: to JSON schema a format
    is an annotation, and libraries write their own (pydantic: ``path``, ``password``)."""
    if isinstance(schema, list):
        return [_with_known_formats(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _with_known_formats(value) if key in SUBSCHEMAS else
            {name: _with_known_formats(item) for name, item in value.items()}
            if key in NAMED_SUBSCHEMAS and isinstance(value, dict) else value
            for key, value in schema.items()
            if not (key == "format" and isinstance(value, str) and value not in FORMATS)}


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MissingDependencyError(
            "llguidance, which follows JSON schemas, is not installed: pip install 'longspan[json]'"
        ) from None
    return llguidance


def _refused(constraint: str, reason: object) -> InvalidRequestError:
    name = "the grammar" if constraint.startswith(GRAMMAR_START) else "json_schema"
    return InvalidRequestError(f"{name} cannot be followed: {_first_line(reason)}")


def _first_line(reason: object) -> str:
    """Return the first line: the library's messages may go on with a dump of its state."""
    lines = [line.strip() for line in str(reason).strip().splitlines() if line.strip()]
    return " ".join(lines[:4])[:300] or "no reason given"
