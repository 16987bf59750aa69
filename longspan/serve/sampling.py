"""From the fields of a request to the engine's `SamplingParams`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from longspan.engine.request import MAX_SEED, RANDOM_SEED, SamplingParams
from longspan.engine.text.call_format import CallFormat
from longspan.serve.errors import ApiError
from longspan.serve.protocol import (
    MAX_INT,
    ChatRequest,
    CompletionRequest,
    JsonSchemaFormat,
    SamplingFields,
)
from longspan.serve.tools import check_tools, offered_tools, tool_grammar

DEFAULT_TEMPERATURE = 1.0
"""OpenAI's default, where the checkpoint recommends none."""
PLAIN_FIELDS = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
                "repetition_penalty", "ignore_eos", "min_tokens")
ALL_ROOM = -1
"""Value of max_tokens, as in other servers."""
ANY_OBJECT = {"type": "object"}


def sampling_params(
    request: ChatRequest | CompletionRequest, defaults: Mapping[str, float],
    default_max_tokens: int, call_format: CallFormat | None = None,
) -> SamplingParams:
    """Build the engine's parameters. Raises 400 for fields that contradict each other.

    Args:
        call_format: how the model writes tool calls; None: it takes no tools.
    """
    values: dict[str, Any] = {
        name: value for name, value in defaults.items() if name in PLAIN_FIELDS}
    values.setdefault("temperature", DEFAULT_TEMPERATURE)
    values.update(_asked(request, call_format))
    return SamplingParams(**{"max_tokens": default_max_tokens, **values})


def _asked(
    request: ChatRequest | CompletionRequest, call_format: CallFormat | None
) -> dict[str, Any]:
    """Return what the request sets, under the engine's names."""
    values = {name: getattr(request, name) for name in PLAIN_FIELDS}
    values["top_k"] = None if request.top_k is None else max(0, request.top_k)
    is_fixed = request.seed not in (None, RANDOM_SEED)
    values["seed"] = request.seed & MAX_SEED if is_fixed and request.seed is not None else None
    values["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
    values["stop"] = [text for text in values["stop"] or () if text]
    values["stop_token_ids"] = request.stop_token_ids
    asked = asked_max_tokens(request)
    values["max_tokens"] = MAX_INT if asked == ALL_ROOM else asked
    values["logit_bias"] = None if request.logit_bias is None else tuple(
        (int(token), bias) for token, bias in request.logit_bias.items())
    values["logprobs"] = _num_logprobs(request)
    if isinstance(request, ChatRequest):
        values.update(_constraint(request, call_format))
        if call_format and request.parallel_tool_calls is False and offered_tools(request):
            values["stop"] += [call_format.end] * bool(call_format.end)
    if isinstance(request, CompletionRequest) and request.echo:
        values["prompt_logprobs"] = request.logprobs
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items() if value is not None}


def asked_max_tokens(request: SamplingFields) -> int | None:
    """Return max_tokens under either of its names, `ALL_ROOM` for as many as there is room for.
    Raises 400 if they contradict each other."""
    newer = getattr(request, "max_completion_tokens", None)
    if newer is not None and request.max_tokens not in (None, newer):
        raise ApiError(400, "max_tokens and max_completion_tokens differ; send one of them.",
                       param="max_tokens")
    return newer if newer is not None else request.max_tokens


def _num_logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    """Return the number of alternatives for each token; None: no log-probabilities."""
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None


def _constraint(request: ChatRequest, call_format: CallFormat | None) -> dict[str, str]:
    """Return what the answer must fit, under the engine's name."""
    schema = _answer_schema(request)
    check_tools(request, call_format)
    if not offered_tools(request):
        return {} if schema is None else {"json_schema": json.dumps(schema)}
    grammar = tool_grammar(request, call_format, schema)
    return {} if grammar is None else {"grammar": grammar}


def _answer_schema(request: ChatRequest) -> Mapping[str, Any] | None:
    """Return the schema of an answer that is no call."""
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    return wanted.json_schema.schema_ if isinstance(wanted, JsonSchemaFormat) else ANY_OBJECT


def check_scoring(request: CompletionRequest) -> None:
    """Raise 400 where nothing is asked for."""
    if request.max_tokens == 0 and not (request.echo and request.logprobs is not None):
        raise ApiError(400, "max_tokens: 0 needs echo: true and logprobs, or there is nothing to "
                       "return.", param="max_tokens")


def check_streaming(request: SamplingFields) -> None:
    """Raise 400 for stream options without a stream."""
    if request.stream:
        return
    for name in ("stream_options", "return_progress"):
        if getattr(request, name):
            raise ApiError(400, f"{name} needs stream: true.", param=name)
