"""`LLM`: answers in the caller's process, driving the loop that a server drives."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

from longspan.attention.observer import AttentionObserver
from longspan.config import EngineConfig
from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler
from longspan.engine.front.tracking import deliver, deliver_recalls, deliver_scores
from longspan.engine.intake import Prompt, as_prompts
from longspan.engine.request import Event, Progress, Request, RequestOutput, SamplingParams
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.engine.setup.group import group_memory, open_group
from longspan.engine.step import StepReport
from longspan.engine.text.completion import Completion
from longspan.engine.text.grammar import Grammars
from longspan.engine.text.tokenizer import load_tokenizer
from longspan.errors import InvalidRequestError, LongspanError

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """What an engine has done so far."""

    num_requests: int
    """Finished requests; cancelled ones do not count."""
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    density: float | None
    """Attention pairs computed over causal pairs, over all prefills."""
    peak_memory_bytes: int
    """Peak of the process on CPUs, of the GPU's allocator otherwise."""


class LLM:
    """A model ready to answer.

    Args:
        model: directory, hub id, or ``nano``.
        options: the other fields of `EngineConfig`.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or of an unknown architecture.
        NotEnoughMemoryError: it does not fit; the message says what to change.
        LongspanError: a field is out of range.
        RankLostError: one of several ranks (``context_parallel``) is gone; also while answering.

    Safe to use from several threads; each step serves all of them.
    """

    def __init__(self, model: str, **options: Any) -> None:
        # No reader waits for single tokens here, so prefill chunks are computed whole.
        options = {"step_budget_s": math.inf, **options}
        config, hub = open_group(EngineConfig(model=str(model), **options))
        try:
            engine = ResolvedEngine.resolve(config, device=group_memory(hub))
            # first what is quickly wrong
            self.tokenizer = load_tokenizer(engine.path, engine.model.vocab_size)
            self._runner = engine.load_runner(hub)
        except BaseException:
            if hub is not None:
                hub.close()
            raise
        self.config, self.model_config = engine.config, engine.model
        self.memory, self.sparsity_plan = engine.memory, engine.plan
        self._grammars = Grammars(self.tokenizer, engine.model.vocab_size)
        self._intake = engine.intake()
        self._loop = Loop(Scheduler(engine.scheduler_config()), self._runner.transport())
        self._completions: dict[str, Completion] = {}
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._is_closed = False
        self._totals = [0, 0, 0, 0]
        self._pairs = [0.0, 0.0]

    # -- answering -----------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or several together; results in the order of the prompts.

        Args:
            prompts: text, token ids, or a list of either.
            sampling_params: for all prompts, or for each of them. With ``prompt_logprobs`` the
                prompts are scored as well; their `RequestOutput.prompt_logprobs` are arrays.
            on_progress: called before the first and after every prefill chunk of each prompt.

        Raises:
            InvalidRequestError: a prompt is empty, a token id is not in the vocabulary, or there
                are not as many ``sampling_params`` as prompts.
            PromptTooLongError: a prompt and its completion do not fit; nothing is computed then.
            RequestFailedError: a completion cannot go on, for the model's numbers are not finite,
                or its JSON schema cannot be followed any further. All prompts of the call end.
        """
        every = as_prompts(prompts)
        each = _for_each(sampling_params or SamplingParams(), len(every))
        completions = self._start([
            self._make_request(prompt, params) for prompt, params in zip(every, each, strict=True)])
        try:
            _report_progress(completions, on_progress)
            while not _are_finished(completions):
                self._turn()
                _report_progress(completions, on_progress)
        finally:
            self._end(completions)
        return [cast(RequestOutput, completion.output) for completion in completions]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[Event]:
        """Complete one prompt, event by event: progress of the prefill, then text.

        The last event is a `TokenEvent` with ``output`` set. Closing the iterator cancels the
        request. Errors as in `generate`, raised by the call, not by the first ``next``.
        """
        request = self._make_request(prompt, sampling_params or SamplingParams())
        return self._stream(request)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], sampling_params: SamplingParams | None = None,
        on_progress: OnProgress | None = None, **template_values: Any,
    ) -> RequestOutput:
        """Answer a conversation, rendered by the checkpoint's chat template. Contents are text:
        what they hold never becomes a control token.

        Args:
            messages: ``{"role": ..., "content": ...}`` in order.
            template_values: variables of the template, such as ``tools``.
        """
        prompt = self._chat_prompt(messages, template_values)
        return self.generate(prompt, sampling_params, on_progress)[0]

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], sampling_params: SamplingParams | None = None,
        **template_values: Any,
    ) -> Iterator[Event]:
        """`chat`, event by event as `stream` gives them."""
        return self.stream(self._chat_prompt(messages, template_values), sampling_params)

    def stats(self) -> EngineStats:
        """Return totals since the start."""
        num_requests, num_prompt, num_cached, num_output = self._totals
        kept, causal = self._pairs
        return EngineStats(
            num_requests=num_requests, num_prompt_tokens=num_prompt, num_cached_tokens=num_cached,
            num_output_tokens=num_output, density=kept / causal if causal else None,
            peak_memory_bytes=self._runner.peak_memory_bytes())

    def observe(self, observer: AttentionObserver | None) -> None:
        """Tell ``observer`` what attention does in every prefill from now on; None: nobody."""
        self._runner.observe(observer)

    def select_by(self, selector: Callable[..., Any] | None) -> None:
        """Let ``selector`` choose what sparse prefill keeps, as `ops.select_vertical_slash` does,
        where benchmarks compare that with others; None: nothing else."""
        self._runner.select_by(selector)

    def watch_logits(self, on_logits: Callable[[int, Any], None] | None) -> None:
        """Show ``on_logits`` the logits of prompt tokens that are scored (``prompt_logprobs``): [n,
        V] fp32 of consecutive rows, and which prompt token the first row predicts. For one request
        at a time; it must change nothing. None: nobody."""
        self._runner.watch_logits(on_logits)

    def close(self) -> None:
        """Cancel what runs and free weights and cache. The object is of no use afterwards."""
        self._end(list(self._completions.values()))
        self._is_closed = True
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- the loop ------------------------------------------------------------------------------

    def _stream(self, request: Request) -> Iterator[Event]:
        # Started at the first `next`: an iterator that nobody reads never occupies the engine.
        (completion,) = self._start([request])
        try:
            while True:
                while completion.events:
                    yield completion.events.popleft()
                if _are_finished([completion]):
                    return
                self._turn()
        finally:
            self._end([completion])

    def _turn(self) -> None:
        """One step for everybody. An interrupt aborts the step's requests, not the engine."""
        with self._lock:
            try:
                report = self._loop.turn()
            except BaseException:
                self._deliver(StepReport(updates=self._loop.interrupt()))
                raise
            self._deliver(report)

    def _deliver(self, report: StepReport) -> None:
        self._pairs[0] += report.kept_pairs
        self._pairs[1] += report.causal_pairs
        deliver_scores(self._completions, report.prompt_logprobs)
        deliver_recalls(self._completions, report.recalls)
        for update in report.updates:
            completion = deliver(self._completions, update, report, self._loop.abort)
            if completion is not None and completion.output is not None:
                self._count(completion.output)

    def _start(self, requests: Sequence[Request]) -> list[Completion]:
        if self._is_closed:
            raise LongspanError("this LLM is closed; make a new one")
        completions = [Completion(request, self.tokenizer) for request in requests]
        for completion, request in zip(completions, requests, strict=True):
            self._completions[completion.request_id] = completion
            self._loop.add(request)
        return completions

    def _end(self, completions: Sequence[Completion]) -> None:
        """Cancel what still runs and let the engine take notice, so that blocks come free.

        Never waits for the lock: an abandoned iterator may be collected in the middle of a turn,
        and the thread that holds the lock then takes notice.
        """
        for completion in completions:
            self._completions.pop(completion.request_id, None)
            if not completion.is_finished:
                self._loop.abort(completion.request_id)
        while not (self._completions or self._loop.is_idle or self._lock.locked()):
            self._turn()

    def _count(self, output: RequestOutput) -> None:
        if output.finish_reason != "abort":
            added = (1, output.num_prompt_tokens, output.num_cached_tokens, len(output.token_ids))
            self._totals = [a + b for a, b in zip(self._totals, added, strict=True)]

    def _chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], template_values: Mapping[str, Any]
    ) -> Sequence[int]:
        return self.tokenizer.encode_chat(messages, **template_values)

    def _make_request(self, prompt: Prompt, params: SamplingParams) -> Request:
        if params.constraint is not None:
            self._grammars.check(params.constraint)
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, add_special_tokens=True)
        return self._intake.make(
            str(next(self._ids)), prompt, params, self.tokenizer.eos_token_ids)


def _for_each(
    params: SamplingParams | Sequence[SamplingParams], num_prompts: int
) -> Sequence[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if len(params) != num_prompts:
        raise InvalidRequestError(
            f"{num_prompts} prompts and {len(params)} sampling_params; give one for all, or one "
            "for each")
    return params


def _are_finished(completions: Sequence[Completion]) -> bool:
    """Tell whether all results are there. Raises the first error, if there is one."""
    for completion in completions:
        if completion.error is not None:
            raise completion.error
    return all(completion.is_finished for completion in completions)


def _report_progress(completions: Sequence[Completion], on_progress: OnProgress | None) -> None:
    for completion in completions:
        while completion.events:
            event = completion.events.popleft()
            if on_progress is not None and isinstance(event, Progress):
                on_progress(event)
