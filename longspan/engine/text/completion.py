"""The caller's side of one request: turns updates of the loop into text, progress and a result.

No torch: the front end of a server, a process of its own, uses it as `LLM` does.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Sequence

from longspan.engine.prefix_origin import PrefixOrigin
from longspan.engine.recall import Recall
from longspan.engine.request import (
    Event,
    FinishReason,
    Progress,
    Request,
    RequestOutput,
    TokenEvent,
    TokenLogprob,
)
from longspan.engine.step import (
    NOT_FINITE,
    PromptLogprobs,
    SparseRecall,
    StepReport,
    Update,
)
from longspan.engine.text.prompt_scores import PromptScores
from longspan.engine.text.text_stream import TextStream
from longspan.engine.text.token_bytes import TokenBytes
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import RequestFailedError


class Completion:
    """Collects what happens to one request, and times it. Events wait in ``events``."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request_id = request.request_id
        self.events: deque[Event] = deque()
        self.output: RequestOutput | None = None
        self.error: Exception | None = None
        """Why there will be no output; to be raised once the events before it are read."""
        self._prompt_len = request.prompt_len
        self._stream = TextStream(tokenizer, request.params.stop)
        self._text: list[str] = []
        self._num_chars = 0
        self._token_bytes = TokenBytes(tokenizer)
        self._logprobs: list[TokenLogprob] = []
        self._held_logprobs: deque[tuple[int, TokenLogprob]] = deque()
        """With the place in the text where each token begins."""
        num_top = request.params.prompt_logprobs
        self._scores = None if num_top is None else PromptScores(request.prompt_len, num_top)
        self._token_ids = array("i")
        self._num_cached_tokens = 0
        self._origin: PrefixOrigin | None = None
        self._is_admitted = self._has_token_event = False
        self._pairs = [0.0, 0.0]  # kept, causal
        self._recalls: list[SparseRecall] = []
        self._arrived_s = time.monotonic()
        self._started_s: float | None = None
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._push_progress(0)

    @property
    def is_finished(self) -> bool:
        """The result is there, or will never be."""
        return self.output is not None or self.error is not None

    def admit(self, num_cached_tokens: int) -> None:
        """Tell what the prefix cache supplied, when the request's first step begins. Later calls do
        nothing, so that callers need not know which step is the first."""
        if self._is_admitted or self.is_finished:
            return
        self._is_admitted = True
        self._num_cached_tokens = num_cached_tokens
        if num_cached_tokens:
            self._push_progress(num_cached_tokens)

    def score(self, part: PromptLogprobs) -> None:
        """Take log-probabilities of some of the prompt's tokens; they come before the update of the
        same step."""
        if self._scores is not None:
            self._scores.take(part)

    def add_recall(self, part: SparseRecall) -> None:
        """Take what a step measured of the prompt's sparse prefill, before the step's update."""
        self._recalls.append(part)

    def push(self, update: Update, report: StepReport) -> bool:
        """Take an update of the loop. True if the request must be stopped by the caller: a stop
        string was found, which only the text shows."""
        if self.is_finished:
            return False
        if update.failure:
            self.error = RequestFailedError(update.failure)
            return False
        if self._scores is not None and self._scores.is_broken:
            raise RequestFailedError(NOT_FINITE)
        self._num_cached_tokens = update.num_cached_tokens
        self._origin = update.origin
        if self._first_s is None and update.finish_reason != "abort":
            self._note_prefill(update, report)
        reason = update.finish_reason
        text = self._add_token(update, report) if update.token_id is not None else ""
        was_stopped = self._stream.is_stopped
        if was_stopped:
            reason = "stop"
        if reason is not None:
            text += self._stream.flush()
        self._text.append(text)
        self._num_chars += len(text)
        logprobs = self._take_logprobs() if self._held_logprobs else ()
        if reason is not None:
            self.output = self._result(reason)
        if reason is not None or update.token_id is not None:
            self.events.append(self._token_event(text, update.token_id, reason, logprobs))
            self._has_token_event = True
        return was_stopped and update.finish_reason is None

    def _note_prefill(self, update: Update, report: StepReport) -> None:
        if self._started_s is None:
            self._started_s = report.submitted_s
        self._pairs[0] += report.kept_pairs
        self._pairs[1] += report.causal_pairs
        self._push_progress(min(update.computed_len, self._prompt_len))

    def _add_token(self, update: Update, report: StepReport) -> str:
        assert update.token_id is not None
        if self._first_s is None:
            self._first_s = report.finished_s
        self._last_s = report.finished_s
        self._token_ids.append(update.token_id)
        # A token that ends the completion is no part of its text.
        is_text = update.finish_reason != "stop"
        # Beside the prompt's log-probabilities nothing is left out: some count from the end.
        if update.logprobs is not None and (is_text or self._scores is not None):
            self._held_logprobs.append((
                self._num_chars + self._stream.num_held,
                self._token_bytes.describe(update.token_id, update.logprobs)))
        return self._stream.push(update.token_id) if is_text else ""

    def _take_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Return those whose text was handed out: a token of a stop string never is."""
        taken = list[TokenLogprob]()
        is_all_out = not (self._stream.num_held or self._stream.is_stopped)
        while self._held_logprobs and (is_all_out or self._held_logprobs[0][0] < self._num_chars):
            taken.append(self._held_logprobs.popleft()[1])
        self._logprobs += taken
        return tuple(taken)

    def _push_progress(self, num_tokens: int) -> None:
        self.events.append(Progress(
            request_id=self.request_id, num_prefilled_tokens=num_tokens,
            num_prompt_tokens=self._prompt_len, num_cached_tokens=self._num_cached_tokens,
            elapsed_s=time.monotonic() - self._arrived_s))

    def _token_event(
        self, text: str, token_id: int | None, reason: FinishReason | None,
        logprobs: tuple[TokenLogprob, ...],
    ) -> TokenEvent:
        return TokenEvent(
            request_id=self.request_id, text=text, finish_reason=reason, output=self.output,
            token_ids=() if token_id is None else (token_id,), logprobs=logprobs,
            num_prompt_tokens=self._prompt_len, num_cached_tokens=self._num_cached_tokens,
            prompt_logprobs=None if self._has_token_event or self._scores is None
            else self._scores.found)

    def _result(self, reason: FinishReason) -> RequestOutput:
        kept, causal = self._pairs
        found = None if self._scores is None else self._scores.found
        return RequestOutput(
            request_id=self.request_id, text="".join(self._text),
            token_ids=tuple(self._token_ids), finish_reason=reason,
            num_prompt_tokens=self._prompt_len, num_cached_tokens=self._num_cached_tokens,
            prefix_origin=self._origin, ttft_s=_span(self._arrived_s, self._first_s),
            prefill_s=_span(self._started_s, self._first_s),
            decode_tokens_per_s=self._decode_rate(), density=kept / causal if causal else None,
            recall=_recall(self._recalls), logprobs=tuple(self._logprobs),
            prompt_logprobs=None if found is None else found.logprobs,
            prompt_alternatives=found if found is not None and found.top_ids.size else None)

    def _decode_rate(self) -> float | None:
        elapsed_s = _span(self._first_s, self._last_s)
        return (len(self._token_ids) - 1) / elapsed_s if elapsed_s else None


def _recall(parts: Sequence[SparseRecall]) -> Recall | None:
    weight, scouts_weight = (sum(part.typical_weight for part in parts),
                             sum(part.scouts_weight for part in parts))
    if not weight:
        return None
    scouts = sum(part.scouts for part in parts) / scouts_weight if scouts_weight else None
    return Recall(sum(part.typical for part in parts) / weight, scouts,
                  sum(part.num_tokens for part in parts))


def _span(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s
