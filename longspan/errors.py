"""Errors that a person can cause: one line, what is wrong, the numbers, what to do.

Each class carries the HTTP status a server answers with; command-line tools print the message
and exit with status 2. Our own invariants use ``assert`` instead.
"""

from __future__ import annotations


class LongspanError(ValueError):
    """Base of every error that a person can cause and mend."""

    http_status: int = 400


class InvalidRequestError(LongspanError):
    """A request field is missing, malformed or not supported."""


class PromptTooLongError(LongspanError):
    """The prompt and the requested completion do not fit the model's limit.

    Args:
        limit: most tokens of prompt and completion together.
    """

    def __init__(self, prompt_len: int, max_tokens: int, limit: int) -> None:
        total_len = prompt_len + max_tokens
        remedy = (f"ask for at most {limit - prompt_len}" if prompt_len < limit
                  else f"shorten the prompt by at least {total_len - limit}")
        super().__init__(f"prompt of {prompt_len} tokens plus max_tokens {max_tokens} is "
                         f"{total_len}, over the limit of {limit} tokens; {remedy}")
        self.prompt_len, self.max_tokens, self.limit = prompt_len, max_tokens, limit


class RequestFailedError(LongspanError):
    """One request could not be completed; the others go on."""

    http_status = 500


class RankLostError(LongspanError):
    """One of the processes that compute together is gone or stands still, and with it the engine.
    Nothing that was asked for was wrong: commands end with status 1."""

    http_status = 500


class CheckpointError(LongspanError):
    """A checkpoint cannot be read: missing, truncated, corrupt or of unknown architecture."""

    http_status = 500


class NotEnoughMemoryError(LongspanError):
    """Weights, KV cache and workspace do not fit the memory there is."""

    http_status = 503


class MissingDependencyError(LongspanError):
    """An optional dependency is not installed; the message holds the install command."""

    http_status = 500
