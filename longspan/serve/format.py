"""Completions as JSON objects: OpenAI's two shapes, whole and in chunks."""

from __future__ import annotations

import codecs
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from longspan.engine.request import TokenEvent, TokenLogprob
from longspan.engine.text.call_format import CallFormat
from longspan.serve.call_parser import Argued, Called, CallParser, Piece, Said
from longspan.serve.generation import Usage

Json = dict[str, Any]
Value = TypeVar("Value")


@dataclass(slots=True)
class Delta:
    """New text of one completion."""

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, event: TokenEvent) -> None:
        """Append an event; a slow reader gets several in one chunk."""
        self.text += event.text
        self.logprobs.extend(event.logprobs)
        self.finish_reason = event.finish_reason or self.finish_reason


class Format(Protocol):
    """One of the two APIs."""

    def opening(self, indices: Sequence[int]) -> list[Json]:
        """Build the chunks in front of a stream's first text."""

    def chunk(self, delta: Delta) -> Json:
        """Build a piece of a stream."""

    def bare_chunk(self, **values: object) -> Json:
        """Build a chunk without choices: progress, usage."""

    def reply(self, deltas: Sequence[Delta], usage: Usage) -> Json:
        """Build the whole answer; each delta is a whole completion."""


class ChatFormat:
    """Format of /v1/chat/completions."""

    def __init__(
        self, request_id: str, model: str, *, with_logprobs: bool,
        call_format: CallFormat | None = None, tool_names: Sequence[str] = (),
    ) -> None:
        self._with_logprobs = with_logprobs
        self._head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": model}
        self._call_format, self._tool_names = call_format, tool_names
        self._parsers = dict[int, CallParser]()

    def opening(self, indices: Sequence[int]) -> list[Json]:
        """Build chunks with the role, one for each completion."""
        return [self._chunk([self._choice(index, {"role": "assistant", "content": ""}, [], None)])
                for index in indices]

    def chunk(self, delta: Delta) -> Json:
        """Build a piece of a stream."""
        pieces, reason = self._read(delta)
        content: Json = {}
        text = "".join(piece.text for piece in pieces if isinstance(piece, Said))
        if text or not (pieces or reason):
            content["content"] = text
        calls = _call_deltas(pieces)
        if calls:
            content["tool_calls"] = calls
        return self._chunk([self._choice(delta.index, content, delta.logprobs, reason)])

    def bare_chunk(self, **values: object) -> Json:
        """Build a chunk without choices."""
        return {**self._chunk([]), **values}

    def reply(self, deltas: Sequence[Delta], usage: Usage) -> Json:
        """Build the whole answer."""
        return {**self._head, "object": "chat.completion", "choices": [
            self._whole_choice(delta) for delta in deltas],
            "usage": usage.as_dict(), "timings": usage.timings()}

    def _whole_choice(self, delta: Delta) -> Json:
        pieces, reason = self._read(delta)
        text = "".join(piece.text for piece in pieces if isinstance(piece, Said))
        calls = _call_deltas(pieces)
        for call in calls:
            del call["index"]
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message = {**message, "content": text or None, "tool_calls": calls}
        return {"index": delta.index, "finish_reason": reason, "message": message,
                "logprobs": self._logprobs(delta.logprobs)}

    def _read(self, delta: Delta) -> tuple[Sequence[Piece], str | None]:
        """Return the parts of new text, and why the answer ends, if it does."""
        if self._call_format is None:
            return [Said(delta.text)] if delta.text else [], delta.finish_reason
        parser = self._parsers.setdefault(
            delta.index, CallParser(self._call_format, self._tool_names))
        pieces = parser.push(delta.text, is_last=delta.finish_reason is not None)
        has_called = parser.num_calls and delta.finish_reason == "stop"
        return pieces, "tool_calls" if has_called else delta.finish_reason

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _choice(
        self, index: int, delta: Json, logprobs: Sequence[TokenLogprob], reason: str | None
    ) -> Json:
        return {"index": index, "delta": delta, "finish_reason": reason,
                "logprobs": self._logprobs(logprobs) if logprobs else None}

    def _logprobs(self, items: Sequence[TokenLogprob]) -> Json | None:
        if not self._with_logprobs:
            return None
        return {"refusal": None, "content": [
            {**_chat_logprob(item), "top_logprobs": [_chat_logprob(other) for other in item.top]}
            for item in items]}


def _call_deltas(pieces: Sequence[Piece]) -> list[Json]:
    """Build what is new of each call, one object a call: clients keep the first of several."""
    deltas = dict[int, Json]()
    for piece in pieces:
        if isinstance(piece, Called):
            deltas[piece.index] = {
                "index": piece.index, "id": f"call_{secrets.token_hex(12)}", "type": "function",
                "function": {"name": piece.name, "arguments": ""}}
        elif isinstance(piece, Argued):
            delta = deltas.setdefault(
                piece.index, {"index": piece.index, "function": {"arguments": ""}})
            delta["function"]["arguments"] += piece.text
    return list(deltas.values())


class CompletionFormat:
    """Format of /v1/completions."""

    def __init__(self, request_id: str, model: str, *, with_logprobs: bool) -> None:
        self._with_logprobs = with_logprobs
        self._places = dict[int, _TextPlace]()
        self._head = {"id": f"cmpl-{request_id}", "object": "text_completion",
                      "created": int(time.time()), "model": model}

    def opening(self, indices: Sequence[int]) -> list[Json]:
        """Return no chunks: plain completions have no role."""
        return []

    def chunk(self, delta: Delta) -> Json:
        """Build a piece of a stream."""
        return {**self._head, "choices": [self._choice(delta)]}

    def bare_chunk(self, **values: object) -> Json:
        """Build a chunk without choices."""
        return {**self._head, "choices": [], **values}

    def reply(self, deltas: Sequence[Delta], usage: Usage) -> Json:
        """Build the whole answer."""
        return {**self._head, "choices": [self._choice(delta) for delta in deltas],
                "usage": usage.as_dict(), "timings": usage.timings()}

    def _choice(self, delta: Delta) -> Json:
        return {"index": delta.index, "text": delta.text, "finish_reason": delta.finish_reason,
                "logprobs": self._logprobs(delta)}

    def _logprobs(self, delta: Delta) -> Json | None:
        if not self._with_logprobs:
            return None
        place = self._places.setdefault(delta.index, _TextPlace())
        return {"tokens": [_name(item) for item in delta.logprobs],
                "token_logprobs": [_or_null(item, _finite(item.logprob))
                                   for item in delta.logprobs],
                "top_logprobs": [_or_null(item, _by_name([*item.top, item]))
                                 for item in delta.logprobs],
                "text_offset": [place.advance(item.data) for item in delta.logprobs]}


class _TextPlace:
    """Counts the characters of a completion, token by token."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0

    def advance(self, data: bytes) -> int:
        """Return where the token begins: at its character, if it is a part of one."""
        start = self._num_chars
        self._num_chars += len(self._decoder.decode(data))
        return start


def _name(item: TokenLogprob) -> str:
    """Write a token as a key: OpenAI writes parts of characters, all U+FFFD, as bytes."""
    try:
        return item.data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in item.data)


def _or_null(item: TokenLogprob, value: Value) -> Value | None:
    """Nothing comes before the first token of a prompt, so it has no probability."""
    return None if math.isnan(item.logprob) else value


def _by_name(items: Sequence[TokenLogprob]) -> dict[str, float]:
    """Return log-probabilities by token, the chosen one always among them."""
    return {_name(item): _finite(item.logprob) for item in items}


def _chat_logprob(item: TokenLogprob) -> Json:
    return {"token": item.text, "bytes": list(item.data), "logprob": _finite(item.logprob)}


def _finite(logprob: float) -> float:
    """Replace minus infinity, which JSON lacks, by -9999, as OpenAI does."""
    return max(-9999.0, logprob)
