"""Requests as OpenAI's API, vLLM and llama.cpp define them; the only pydantic input models.

Fields that clients send and that this server does not have are declared with the values that ask
for nothing (`Neutral`), and any other is refused by name. Hints, which change no answer, are taken
and ignored. Unknown fields are refused by name too.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, PlainValidator, WithJsonSchema

from longspan.engine.request import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_NUM_BIASES,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
)
from longspan.serve.messages import Hint, Messages, Neutral, Strict, ToolChoice, Tools

MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_INT = 2**31 - 1
MAX_ANSWER = 1_000_000
"""Characters of an answer, or a question, whose sources are looked for."""
BiasKey = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)]



def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("must be a positive number, or -1 for as many as there is room for")
    return value


TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
MaxTokens = Annotated[int, Field(ge=-1, le=MAX_INT), AfterValidator(_not_zero)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Scalar = bool | int | float | Annotated[str, Field(max_length=1024)]
TemplateValues = Annotated[
    dict[Annotated[str, Field(pattern="^[a-z_]{1,64}$")], Scalar], Field(max_length=16)]


def _as_prompts(value: Any) -> list[str | array[int]]:
    """Check a million ids in a tenth of the time that validating each would take."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"at most {MAX_PROMPTS} prompts in one request")
        return [_as_prompt(item) for item in value]
    return [_as_prompt(value)]


def _as_prompt(value: Any) -> str | array[int]:
    if not value or not isinstance(value, str | list):
        raise ValueError("must be text or token ids, or a list of either, and not empty")
    return value if isinstance(value, str) else _as_token_ids(value)


def _as_token_ids(value: Any) -> array[int]:
    if isinstance(value, list) and set(map(type, value)) <= {int}:
        with suppress(OverflowError):
            ids = array("i", value)
            if not ids or min(ids) >= 0:
                return ids
    raise ValueError(f"token ids must be integers from 0 to {MAX_INT}")


ID_SCHEMA = {"type": "integer", "minimum": 0, "maximum": MAX_INT}
TEXT_SCHEMA = {"type": "string", "minLength": 1}
IDS_SCHEMA = {"type": "array", "items": ID_SCHEMA, "minItems": 1}
Prompts = Annotated[list[str | Sequence[int]], PlainValidator(_as_prompts), WithJsonSchema({
    "anyOf": [TEXT_SCHEMA, IDS_SCHEMA, *(
        {"type": "array", "items": item, "minItems": 1, "maxItems": MAX_PROMPTS}
        for item in (TEXT_SCHEMA, IDS_SCHEMA))]})]
TokenIds = Annotated[Sequence[int], PlainValidator(_as_token_ids), WithJsonSchema(
    {"type": "array", "items": ID_SCHEMA})]


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool = False
    """A last chunk without choices, with the usage."""
    continuous_usage_stats: bool = False
    """The usage so far in every chunk."""
    include_obfuscation: Hint = None


class SamplingFields(Strict):
    """What chat and plain completions have in common."""

    model: Annotated[str, Field(max_length=512)] | None = None
    """Name of the served model (see /v1/models); null: whatever is served."""
    max_tokens: MaxTokens | None = None
    """Longest completion, tokens; null: the server's default, less if there is less room; -1: as
    long as there is room."""
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = None
    """0: always the most probable token; null: the checkpoint's advice, else 1."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Keep the smallest set of tokens that reaches this probability; 0: the most probable one."""
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K)] | None = None
    """Keep the k most probable tokens; 0 or -1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Keep tokens at least this fraction as probable as the most probable one."""
    presence_penalty: Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] | None = None
    """Taken from the logit of each token that the completion already has."""
    frequency_penalty: Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] | None = None
    """Taken from a token's logit for each time that the completion already has it."""
    repetition_penalty: Annotated[float, Field(
        ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] | None = None
    """Divides positive logits of tokens in prompt or completion (and multiplies negative ones);
    1: none; null: the checkpoint's advice, else 1."""
    logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=MAX_NUM_BIASES)] | None = None
    """Added to the logits of tokens, by token id."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """Same seed, same request, same answer; null or -1: a fresh one."""
    stop: Stop | Annotated[
        list[Stop], Field(fail_fast=True, max_length=MAX_STOPS)] | Literal[""] | None = None
    """Text that ends the completion; it is not part of it."""
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=64)] | None = None
    """Tokens that end the completion."""
    ignore_eos: bool | None = None
    """Go on past the end-of-text token (for benchmarks)."""
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    """Shortest completion, tokens: no end-of-text and no stop token before."""
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    """Completions for each prompt; they share its prefill."""
    stream: bool | None = None
    """Send the completion as server-sent events, as it is made."""
    stream_options: StreamOptions | None = None
    """Only with stream."""
    return_progress: bool | None = None
    """With stream: chunks without choices that tell how far the prefill is, in llama.cpp's form
    (prompt_progress: total, cache, processed, time_ms), and the predicted time to first token."""
    user: Annotated[str, Field(max_length=512)] | None = None
    """A hint."""

    # Hints
    service_tier: Hint = None
    prompt_cache_key: Hint = None
    prompt_cache_retention: Hint = None
    prompt_cache_options: Hint = None
    safety_identifier: Hint = None
    store: Hint = None
    metadata: Hint = None
    cache_prompt: Hint = None
    priority: Hint = None
    # Nothing but what this server does anyway
    skip_special_tokens: Annotated[Any, Neutral(True)] = None
    spaces_between_special_tokens: Annotated[Any, Neutral(True, False)] = None
    include_stop_str_in_output: Annotated[Any, Neutral(False)] = None
    length_penalty: Annotated[Any, Neutral(1, 1.0)] = None
    use_beam_search: Annotated[Any, Neutral(False)] = None
    typical_p: Annotated[Any, Neutral(1, 1.0)] = None


class JsonSchemaBody(Strict):
    """A named JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    # A method of pydantic's models has the name that the wire uses.
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """Accepted and ignored: the answer always fits the schema."""


class TextFormat(Strict):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaBody


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Discriminator("type")]


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: MaxTokens | None = None
    """Newer name of max_tokens."""
    tools: Tools | None = None
    """Functions that the model may call, if its chat template takes any."""
    tool_choice: ToolChoice | None = None
    """none, auto (the default with tools), required, or one of the tools by its name; answers to
    the last two are held to the tools' schemas by a grammar."""
    parallel_tool_calls: bool | None = None
    """false: one call at most."""
    add_generation_prompt: bool | None = None
    """Default: true, unless continue_final_message."""
    continue_final_message: bool | None = None
    """The last message, the assistant's, is the beginning of the answer."""
    logprobs: bool | None = None
    """Return the log-probability of each token."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """With logprobs: return this many alternatives too."""
    response_format: ResponseFormat | None = None
    """Constrain the answer to JSON."""
    chat_template_kwargs: TemplateValues | None = None
    """Further variables of the chat template, such as enable_thinking."""

    # Hints
    reasoning_effort: Hint = None
    verbosity: Hint = None
    prediction: Hint = None
    # Nothing but what this server does anyway
    functions: Annotated[Any, Neutral([])] = None
    function_call: Annotated[Any, Neutral("none", "auto")] = None
    modalities: Annotated[Any, Neutral(["text"])] = None
    audio: Annotated[Any, Neutral()] = None
    web_search_options: Annotated[Any, Neutral()] = None


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: Prompts
    """Text or token ids, or a list of either; here always a list."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Return log-probabilities of each token and of this many alternatives; with echo, of the
    prompt's tokens too."""
    max_tokens: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    """Longest completion, tokens, as for chats. 0, with
    echo and logprobs: the prompt is scored, and nothing is added to it."""
    add_special_tokens: bool = True
    """Put the checkpoint's beginning-of-text token in front, if it has one."""

    best_of: Annotated[Any, Neutral(1)] = None
    echo: bool | None = None
    """Put the prompt in front of the completion."""
    suffix: Annotated[Any, Neutral("")] = None


class TokenizeRequest(Strict):
    """POST /tokenize: exactly one of prompt and messages."""

    model: Annotated[str, Field(max_length=512)] | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """Default: true for a prompt, false for messages, whose template has them."""
    tools: Tools | None = None
    """With messages: as in a chat."""
    add_generation_prompt: bool = True
    """With messages: end with the beginning of the assistant's turn."""
    chat_template_kwargs: TemplateValues | None = None
    return_tokens: bool = True
    """False: only the count, for long texts."""


class NamedText(Strict):
    """A document of /sources."""

    name: str
    text: str


class SourcesRequest(Strict):
    """POST /sources."""

    model: Annotated[str, Field(max_length=512)] | None = None
    documents: list[NamedText]
    answer: Annotated[str, Field(max_length=MAX_ANSWER)]
    question: Annotated[str, Field(max_length=MAX_ANSWER)] = ""


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: Annotated[str, Field(max_length=512)] | None = None
    tokens: TokenIds
