"""The shapes of answers, for the OpenAPI schema; the answers themselves are plain objects."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "tool_calls"]


class Reply(BaseModel):
    """Answers are read, not written, by clients: further fields may come."""

    model_config = ConfigDict(protected_namespaces=())


class ErrorDetail(Reply):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """Any answer with a status of 400 or above."""

    error: ErrorDetail


class PromptTokensDetails(Reply):
    """Details of the prompt's tokens."""

    cached_tokens: int
    host_tokens: int | None = None
    """Those of them that came from host memory; absent: all were on the device."""
    disk_tokens: int | None = None
    """Those that were read from disk."""
    load_ms: float | None = None
    """Time until they were on the device."""


class AttentionRecall(Reply):
    """Share of attention mass that sparse prefill kept, measured on some rows."""

    typical: float
    """Mean over rows spread over the prompt."""
    scouts: float | None = None
    """Mean over the rows that look something up; absent: the plan has no scouts."""
    num_tokens: int
    """Prompt tokens that the shares cover: computed for this request, and sparsely."""


class UsageReply(Reply):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    attention_recall: AttentionRecall | None = None
    """Absent where nothing was prefilled sparsely."""


class Timings(Reply):
    """llama.cpp's timings (``predicted_`` there means generated), and the time to first token."""

    cache_n: int
    prompt_n: int
    prompt_ms: float | None
    prompt_per_second: float | None
    predicted_n: int
    predicted_ms: float | None
    predicted_per_second: float | None
    ttft_ms: float | None
    predicted_ttft_ms: float | None
    """What the server expected when the request arrived."""


class CalledFunctionReply(Reply):
    """What the model calls."""

    name: str
    arguments: str
    """JSON text of an object."""


class ToolCallReply(Reply):
    """A call."""

    id: str
    type: Literal["function"]
    function: CalledFunctionReply


class AssistantMessage(Reply):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    """Null where there is nothing beside the calls."""
    refusal: None
    tool_calls: list[ToolCallReply] | None = Field(default=None)
    """Absent when nothing is called."""


class ChatLogprob(Reply):
    """A token and its probability."""

    token: str
    bytes: list[int]
    logprob: float


class ChatTokenLogprob(ChatLogprob):
    """A token of the answer, with alternatives."""

    top_logprobs: list[ChatLogprob]


class ChatLogprobs(Reply):
    """Log-probabilities of each token of the answer."""

    content: list[ChatTokenLogprob]
    refusal: None


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None


class ChatReply(Reply):
    """Answer of /v1/chat/completions without stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageReply
    timings: Timings


class CompletionLogprobs(Reply):
    """For each token of the completion, after those of the prompt where it is echoed; null for the
    prompt's first."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    """One completion."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: CompletionLogprobs | None


class CompletionReply(Reply):
    """Answer of /v1/completions without stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageReply
    timings: Timings


class ModelCard(Reply):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    capacity_tokens: int
    """Tokens that the KV cache holds."""


class ModelList(Reply):
    """Answer of /v1/models: one model."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeReply(Reply):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    predicted_ttft_ms: float | None
    """If a prompt of this length arrived now."""
    tokens: list[int] | None = Field(default=None)
    """Absent when not wanted."""


class SourceReply(Reply):
    """A passage that an answer's words stand in, or what was asked about instead."""

    name: str
    start: int
    stop: int
    line: int
    quote: str
    share: float
    is_asked: bool


class SourcesReply(Reply):
    """Answer of /sources: the best ones first, none where the documents do not say it."""

    sources: list[SourceReply]


class DetokenizeReply(Reply):
    """Answer of /detokenize."""

    prompt: str


class HealthReply(Reply):
    """Answer of /health: 200 when ready, 503 otherwise."""

    status: Literal["loading", "ready", "draining", "dead"]
    reason: str


STREAM: dict[str, Any] = {"text/event-stream": {"schema": {
    "type": "object", "description": "One server-sent event.", "required": ["data"],
    "properties": {"data": {
        "type": "string", "contentMediaType": "application/json",
        "description": "A chunk in OpenAI's form, an object with error, or [DONE]."}}}}}
