"""Follows results to a request's end, and delivers updates to its text. No torch.

`longspan.engine.front.llm.LLM` does this beside the loop;
`longspan.engine.front.client.AsyncEngine` on the caller's side, where it knows the engine by its
messages only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from itertools import zip_longest

from longspan.engine.prefix_origin import PrefixOrigin
from longspan.engine.processes.wire import Stepped
from longspan.engine.request import Request, conclude
from longspan.engine.step import (
    PromptLogprobs,
    RowLogprobs,
    SparseRecall,
    StepReport,
    Update,
)
from longspan.engine.text.completion import Completion


class Tracker:
    """Follows one request by the runner's results alone, and comes to the scheduler's conclusions
    without waiting for them."""

    def __init__(self, request: Request) -> None:
        self._request_id, self._params = request.request_id, request.params
        self._eos_token_ids = request.eos_token_ids
        self._num_cached_tokens: int | None = None
        self._num_outputs = 0
        self.origin: PrefixOrigin | None = None
        """Where the cached tokens came from; told by the first step's slice."""

    def update(
        self, cached_len: int, computed_len: int, sampled: int | None,
        logprobs: RowLogprobs | None, failure: str,
    ) -> Update:
        """Take a step that computed tokens ``cached_len`` to ``computed_len - 1``.

        Args:
            sampled: None: the step sampled nothing. Negative: sampling failed.
            failure: why it failed.
        """
        if self._num_cached_tokens is None:  # the first step begins where the cache ends
            self._num_cached_tokens = cached_len
        token, reason = conclude(
            self._params, self._eos_token_ids, sampled, self._num_outputs)
        self._num_outputs += token is not None
        return Update(
            request_id=self._request_id, computed_len=computed_len, token_id=token,
            num_cached_tokens=self._num_cached_tokens, finish_reason=reason, logprobs=logprobs,
            failure=failure if reason == "abort" else "", origin=self.origin)


def updates(message: Stepped, trackers: Mapping[str, Tracker]) -> Iterator[Update]:
    """Yield what a step changed for the requests that are followed, token by token. Those that
    have ended are followed no longer: what was computed past their end is dropped."""
    result = message.result
    sampled = enumerate(zip_longest(result.token_ids, result.logprobs))
    nothing = 0, (None, None)
    for index in range(result.repeats):
        for item in message.slices:
            place, (token, logprobs) = next(sampled, nothing) if item.samples else nothing
            tracker = trackers.get(item.request_id)
            if tracker is not None:
                tracker.origin = item.origin or tracker.origin
                yield tracker.update(item.cached_len + index, item.computed_len + index, token,
                                     logprobs, result.failure(place))


def deliver_scores(
    completions: Mapping[str, Completion], parts: Sequence[PromptLogprobs]
) -> None:
    """Hand a step's log-probabilities of prompts to those who wait, before the step's updates."""
    for part in parts:
        completion = completions.get(part.request_id)
        if completion is not None:
            completion.score(part)


def deliver_recalls(
    completions: Mapping[str, Completion], parts: Sequence[SparseRecall]
) -> None:
    """Hand a step's recall to those who wait, before the step's updates."""
    for part in parts:
        completion = completions.get(part.request_id)
        if completion is not None:
            completion.add_recall(part)


def deliver(
    completions: MutableMapping[str, Completion], update: Update, report: StepReport,
    abort: Callable[[str], None],
) -> Completion | None:
    """Hand an update to its completion, which leaves ``completions`` when it is finished. An
    exception while text is made ends that request alone: the completion keeps it.

    Args:
        abort: called with the id of a request that has ended by its text (a stop string, a fault).

    Returns the completion; None where it was cancelled.
    """
    completion = completions.get(update.request_id)
    if completion is None:
        return None
    try:
        must_stop = completion.push(update, report)
    except Exception as error:
        completion.error, must_stop = error, True
    if must_stop:
        abort(update.request_id)
    if completion.is_finished:
        completions.pop(update.request_id, None)
    return completion
