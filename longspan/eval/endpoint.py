"""A model behind any OpenAI-compatible address: ours, another engine's, a company's.

Prompts go as token ids to ``/v1/completions``, so that lengths are exact; or as messages to
``/v1/chat/completions`` for servers that take nothing else. Answers are streamed: that a stream
ends without a finish reason tells a cut answer from a whole one. What passes (rate limits, dropped
connections, cut streams, timeouts, errors of the server) is tried again; an answer counts once,
when it is whole.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from longspan.errors import LongspanError, MissingDependencyError
from longspan.eval.prompt import Prompt
from longspan.eval.task import Answer
from longspan.proxies import check_proxies

if TYPE_CHECKING:
    import httpx

TIMEOUT_STATUS = (408, 504)
PASSING_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
MAX_CONNECT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointConfig:
    """Where the model is and how patient to be."""

    url: str
    """The API's address, with ``/v1`` if the server wants it."""
    model: str
    api: str = "completions"
    """``completions`` or ``chat``."""
    api_key: str = "none"
    timeout_s: float = 3600.0
    """Longest silence: a million tokens are read for minutes before the first one is written."""
    max_attempts: int = 8
    """For one prompt."""
    max_wait_s: float = 1800.0
    """Longest time that the pauses between the attempts at one prompt take together."""

    def __post_init__(self) -> None:
        if self.api not in ("completions", "chat"):
            raise LongspanError(f"--api: {self.api!r} is not one of completions, chat")
        if not self.url.startswith(("http://", "https://")):
            raise LongspanError(f"--url: {self.url!r} is no address such as "
                                "http://127.0.0.1:8000/v1")
        if self.max_attempts < 1 or self.timeout_s <= 0:
            raise LongspanError(f"{self.max_attempts} attempts of {self.timeout_s} s: both must be "
                                "positive")


class NoAnswerError(LongspanError):
    """All attempts at one prompt failed."""

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status


class _Retry(Exception):
    """An attempt failed in a way that passes."""

    def __init__(
        self, reason: str, status: str = "error", pause_s: float | None = None
    ) -> None:
        super().__init__(reason)
        self.reason, self.status = reason, status
        self.pause_s = pause_s
        """How long the server wants to be left alone."""


class Endpoint:
    """`Generate` and `Score` over HTTP, a context manager. Safe to use from several threads.

    Args:
        sleep: for tests.

    Raises `MissingDependencyError` without httpx.
    """

    def __init__(
        self, config: EndpointConfig, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._config, self._sleep = config, sleep
        self._client = _client(config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def __call__(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
        """One answer for each prompt, one after the other: prefixes are cached then."""
        return [self._answer(prompt, {"max_tokens": max_tokens}) for prompt in prompts]

    def score(self, prompts: Sequence[Prompt], firsts: Sequence[int] = ()) -> list[Answer]:
        """Log-probabilities of each prompt, which a server of ``completions`` echoes: all of them,
        whatever ``firsts`` are. Raises `LongspanError` when it does not."""
        fields = {"max_tokens": 0, "echo": True, "logprobs": 1}  # some take 0 for none at all
        return [self._answer(prompt, fields) for prompt in prompts]

    def say(self, messages: Sequence[dict[str, str]], max_tokens: int) -> str:
        """Return the reply to a conversation, whatever the API of prompts is. Raises
        `NoAnswerError` when there is none after all attempts."""
        return self.converse(messages, max_tokens).text

    def converse(
        self, messages: Sequence[dict[str, str]], max_tokens: int, **sampling: float
    ) -> Answer:
        """Return the reply to a conversation, sampled as the server names it (``temperature``,
        ``seed``). Raises `NoAnswerError` when there is none after all attempts."""
        return self._chat(messages, max_tokens, **sampling)

    def max_model_len(self) -> int | None:
        """Return the longest prompt and answer, where the server says so. Raises `LongspanError`
        when nobody answers there."""
        import httpx

        try:
            response = self._client.get("models")
            models = response.json()["data"] if response.is_success else []
            limits = [model.get("max_model_len") for model in models
                      if model["id"] == self._config.model]
        except httpx.TransportError as error:
            raise LongspanError(f"{self._config.url}: no server answers there ({_reason(error)}); "
                                "start it, or correct --url") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None  # many servers have no such list, or another one
        return limits[0] if limits and isinstance(limits[0], int) else None

    def _answer(self, prompt: Prompt, asked: Mapping[str, Any]) -> Answer:
        try:
            return self._patiently(prompt, asked)
        except NoAnswerError as error:
            return Answer(status=error.status, error=str(error))

    def _patiently(self, prompt: Prompt, asked: Mapping[str, Any]) -> Answer:
        if self._config.api == "chat":
            return self._chat([{"role": "user", "content": prompt.message}], asked["max_tokens"])
        fields = {"prompt": prompt.ids.tolist(), **asked}
        return self._with_retries(
            lambda: self._attempt("completions", fields, len(prompt.ids)))

    def _chat(
        self, messages: Sequence[dict[str, str]], max_tokens: int, **sampling: float
    ) -> Answer:
        fields = {"messages": list(messages), "max_tokens": max_tokens, **sampling}
        return self._with_retries(lambda: self._attempt("chat/completions", fields))

    def _with_retries(self, attempt: Callable[[], Answer]) -> Answer:
        """Return the first whole answer. Raises `NoAnswerError` when patience is at its end."""
        waited_s = 0.0
        for number in range(1, self._config.max_attempts + 1):
            try:
                return attempt()
            except _Retry as failure:
                pause_s = failure.pause_s
                if pause_s is None:  # spread, so that waiting requests do not come back together
                    pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (number - 1))
                    pause_s *= 0.5 + random.random() / 2
                waited_s += pause_s
                if number == self._config.max_attempts or waited_s > self._config.max_wait_s:
                    raise NoAnswerError(f"no answer after {number} attempts: {failure.reason}",
                                        failure.status) from None
                self._sleep(pause_s)
        raise AssertionError("unreachable")

    def _attempt(
        self, path: str, fields: dict[str, Any], prompt_len: int | None = None
    ) -> Answer:
        """Send one request. Raises `_Retry` for what passes, `LongspanError` for what does not."""
        import httpx

        body = {"model": self._config.model, "temperature": 0.0, "stream": True,
                "stream_options": {"include_usage": True}, **fields}
        stream = _Stream(time.monotonic())
        try:
            with self._client.stream("POST", path, json=body) as response:
                if not response.is_success:
                    response.read()
                    raise self._of_status(response)
                for line in response.iter_lines():
                    stream.read(line)
        except httpx.TimeoutException:
            raise _Retry(f"no word for {self._config.timeout_s:g} s", "timeout") from None
        except httpx.TransportError as error:
            raise _Retry(_reason(error)) from None
        answer = stream.answer(prompt_len)
        if not fields.get("echo"):
            return answer
        assert prompt_len is not None
        return replace(answer, text="", logprobs=stream.prompt_logprobs(prompt_len))

    def _of_status(self, response: httpx.Response) -> Exception:
        """Return what an HTTP status means for the prompt, or for the run."""
        reason = f"HTTP {response.status_code}: {_error_text(response)}"
        if response.status_code in PASSING_STATUS:
            status = "timeout" if response.status_code in TIMEOUT_STATUS else "error"
            return _Retry(reason, status, retry_after_s(response.headers.get("retry-after")))
        return LongspanError(f"{self._config.url} refuses the request ({reason}); what was "
                             "answered before is kept")


@dataclass(slots=True)
class _Stream:
    """An answer while it comes, as server-sent events."""

    start_s: float
    parts: list[str] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    finish_reason: str | None = None
    ttft_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int = 0

    def read(self, line: str) -> None:
        """Take in a line. Raises `_Retry` for an error that is told in the stream."""
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            return
        try:
            event = json.loads(data)
            if event.get("error"):
                raise _Retry(f"the server says: {event['error']}"[:300])
            for choice in event.get("choices", ()):
                self._take(choice)
            usage = event.get("usage") or {}
            self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
            details = usage.get("prompt_tokens_details") or {}
            self.cached_tokens = details.get("cached_tokens") or self.cached_tokens
        except (ValueError, AttributeError, TypeError):
            raise _Retry(f"the stream holds what is no event: {data[:80]}") from None

    def _take(self, choice: dict[str, Any]) -> None:
        text = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
        if text and self.ttft_s is None:
            self.ttft_s = round(time.monotonic() - self.start_s, 4)
        self.parts.append(text)
        self.logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or ()
        self.finish_reason = self.finish_reason or choice.get("finish_reason")

    def answer(self, prompt_len: int | None) -> Answer:
        """Return the whole answer. Raises `_Retry` when it was cut short, `LongspanError` when the
        server cut the prompt."""
        if self.finish_reason is None:
            raise _Retry("the stream ended before the answer did")
        read = self.prompt_tokens
        if prompt_len is not None and read is not None and read < prompt_len:
            raise LongspanError(f"the server read {read:,} of {prompt_len:,} prompt "
                                "tokens: it cuts long prompts; raise its limit or ask for less")
        return Answer(text="".join(self.parts), ttft_s=self.ttft_s,
                      num_cached_tokens=self.cached_tokens, finish_reason=self.finish_reason)

    def prompt_logprobs(self, prompt_len: int) -> np.ndarray:
        """[T - 1] of an echoed prompt. Raises `LongspanError` where there are not as many."""
        found = np.array(self.logprobs[1:], np.float64)  # NaN for null
        if len(found) != prompt_len - 1 or np.isnan(found).any():
            raise LongspanError(
                f"the server gave log-probabilities of {np.isfinite(found).sum():,} of "
                f"{prompt_len - 1:,} prompt tokens (echo with max_tokens 0); leave perplexity out")
        return found


def retry_after_s(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which holds a number or a date; None for
    neither."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _client(config: EndpointConfig) -> httpx.Client:
    try:
        import httpx
    except ImportError:
        raise MissingDependencyError(
            "endpoints are asked with httpx, which is not installed: pip install 'longspan[eval]'"
        ) from None
    check_proxies()
    return httpx.Client(
        base_url=config.url, headers={"Authorization": f"Bearer {config.api_key}"},
        timeout=httpx.Timeout(config.timeout_s, connect=min(config.timeout_s, MAX_CONNECT_S)),
        limits=httpx.Limits(max_connections=None))


def _error_text(response: httpx.Response) -> str:
    """Return what the server says is wrong, on one line."""
    try:
        content = response.json()
        error = content.get("error", content)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(str(text).split())[:300]


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
