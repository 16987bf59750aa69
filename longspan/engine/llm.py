"""`LLM`: one process, one call. Drives the same loop as a server would."""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, cast

import torch

from longspan.attention.sparsity import SparsityPlan
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.loop import LocalTransport, Loop, StepReport
from longspan.engine.memory import MemoryPlan, plan_memory
from longspan.engine.prompts import Prompt, as_prompts, as_token_ids, check_fits
from longspan.engine.request import (
    MAX_SEED,
    Progress,
    Request,
    RequestOutput,
    SamplingParams,
    TokenEvent,
)
from longspan.engine.resolve import (
    may_be_sparse,
    resolve_attention,
    resolve_config,
    resolve_positions,
)
from longspan.engine.runner import Runner, resolve_plan
from longspan.engine.scheduler import Scheduler, SchedulerConfig, max_step_tokens
from longspan.engine.session import Session
from longspan.engine.tokenizer import Tokenizer
from longspan.errors import CheckpointError, LongspanError
from longspan.model.weights import resolve_checkpoint

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """What the engine did so far."""

    num_requests: int
    """Finished ones; cancelled ones do not count."""
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    density: float | None
    """Attention pairs computed over causal pairs, over all prefills."""
    peak_memory_bytes: int
    """Of the process on CPUs, of the GPU's allocator otherwise."""


class LLM:
    """A model ready to answer.

    Args:
        model: directory, hub id, or ``nano``.
        options: the other fields of `EngineConfig`.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or of an unknown architecture.
        NotEnoughMemoryError: it does not fit; the message says what to change.
        LongspanError: a field is out of range.

    Safe to use from several threads; each step serves all of them.
    """

    def __init__(self, model: str, **options: Any) -> None:
        asked = resolve_config(
            EngineConfig(model=str(model), **options), has_cuda=torch.cuda.is_available())
        path = resolve_checkpoint(asked.model)
        self.model_config = ModelConfig.from_dir(path)
        self.tokenizer = Tokenizer(path)
        if self.tokenizer.vocab_size > self.model_config.vocab_size:
            raise CheckpointError(
                f"{path}: the tokenizer knows {self.tokenizer.vocab_size} tokens, the model only "
                f"{self.model_config.vocab_size}; fetch matching files")
        self._dca = resolve_positions(asked.positions, self.model_config)
        plan = resolve_plan(path, self.model_config, asked)
        self._has_plan = plan is not None
        self.sparsity_plan = self._plan_in_effect(asked, plan)
        self.memory = self._plan_memory(asked)
        self.config = replace(asked, max_model_len=self.memory.max_model_len)
        self._runner = Runner.load(
            path, self.model_config, self.config, self.memory, dca=self._dca,
            plan=self.sparsity_plan)
        self._loop = Loop(Scheduler(self._scheduler_config()), LocalTransport(self._runner))
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._is_closed = False
        self._totals = [0, 0, 0, 0]
        self._pairs = [0.0, 0.0]

    # -- answering -----------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or several together; results in the order of the prompts.

        Args:
            prompts: text, token ids, or a list of either.
            on_progress: called before the first and after every prefill chunk of each prompt.

        Raises:
            InvalidRequestError: a prompt is empty, or a token id is not in the vocabulary.
            PromptTooLongError: a prompt and its completion do not fit; nothing is computed then.
        """
        params = sampling_params or SamplingParams()
        sessions = self._start([self._make_request(p, params) for p in as_prompts(prompts)])
        try:
            _report_progress(sessions, on_progress)
            while not all(session.is_finished for session in sessions):
                self._turn()
                _report_progress(sessions, on_progress)
        finally:
            self._end(sessions)
        return [cast(RequestOutput, session.output) for session in sessions]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[Progress | TokenEvent]:
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
        """Answer a conversation, rendered by the checkpoint's chat template.

        Args:
            messages: ``{"role": ..., "content": ...}`` in order.
            template_values: variables of the template, such as ``tools``.
        """
        text = self.tokenizer.render_chat(messages, **template_values)
        prompt = self.tokenizer.encode(text, add_special_tokens=False)  # the template has them
        return self.generate(prompt, sampling_params, on_progress)[0]

    def stats(self) -> EngineStats:
        """Totals since the start."""
        num_requests, num_prompt, num_cached, num_output = self._totals
        kept, causal = self._pairs
        return EngineStats(
            num_requests=num_requests, num_prompt_tokens=num_prompt, num_cached_tokens=num_cached,
            num_output_tokens=num_output, density=kept / causal if causal else None,
            peak_memory_bytes=self._runner.peak_memory_bytes())

    def close(self) -> None:
        """Cancel what runs and free weights and cache. The object is of no use afterwards."""
        self._end(list(self._sessions.values()))
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

    def _stream(self, request: Request) -> Iterator[Progress | TokenEvent]:
        # Started at the first `next`: an iterator that nobody reads never occupies the engine.
        (session,) = self._start([request])
        try:
            while True:
                while session.events:
                    yield session.events.popleft()
                if session.is_finished:
                    return
                self._turn()
        finally:
            self._end([session])

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
        for update in report.updates:
            session = self._sessions.get(update.request_id)
            if session is None:
                continue
            if session.push(update, report):
                self._loop.abort(update.request_id)
            if session.output is not None:
                self._sessions.pop(update.request_id, None)
                self._count(session.output)

    def _start(self, requests: Sequence[Request]) -> list[Session]:
        if self._is_closed:
            raise LongspanError("this LLM is closed; make a new one")
        sessions = [Session(request, self.tokenizer) for request in requests]
        for session, request in zip(sessions, requests, strict=True):
            self._sessions[session.request_id] = session
            self._loop.add(request)
        return sessions

    def _end(self, sessions: Sequence[Session]) -> None:
        """Cancel what still runs and let the engine take notice, so that blocks come free.

        Never waits for the lock: an abandoned iterator may be collected in the middle of a turn.
        Whoever holds it then takes notice instead.
        """
        for session in sessions:
            self._sessions.pop(session.request_id, None)
            if session.output is None:
                self._loop.abort(session.request_id)
        while not (self._sessions or self._loop.is_idle or self._lock.locked()):
            self._turn()

    def _count(self, output: RequestOutput) -> None:
        if output.finish_reason != "abort":
            added = (1, output.num_prompt_tokens, output.num_cached_tokens, len(output.token_ids))
            self._totals = [a + b for a, b in zip(self._totals, added, strict=True)]

    # -- requests and configuration ------------------------------------------------------------

    def _make_request(self, prompt: Prompt, params: SamplingParams) -> Request:
        encoded = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        token_ids = as_token_ids(encoded, self.model_config.vocab_size)
        check_fits(len(token_ids), params.max_tokens, self.memory.max_model_len)
        return Request(
            request_id=str(next(self._ids)), prompt_ids=token_ids, params=params,
            seed=secrets.randbelow(MAX_SEED) if params.seed is None else params.seed,
            eos_token_ids=self.tokenizer.eos_token_ids,
            sparse=resolve_attention(
                self.config.attention, len(token_ids), has_plan=self._has_plan,
                threshold=self.model_config.sparse_threshold, has_dca=self._dca is not None))

    def _plan_in_effect(
        self, config: EngineConfig, plan: SparsityPlan | None
    ) -> SparsityPlan | None:
        if not may_be_sparse(
            config.attention, has_plan=plan is not None, has_dca=self._dca is not None,
        ):
            return None
        model = self.model_config
        return plan or SparsityPlan.default(model.num_layers, model.num_heads)

    def _plan_memory(self, config: EngineConfig) -> MemoryPlan:
        assert config.prefill_chunk_len is not None
        # Rotation tables are as long as the context without DCA.
        model = replace(self.model_config, dca=self._dca)
        return plan_memory(
            model, config, sparse=self.sparsity_plan is not None,
            max_step_tokens=max_step_tokens(config.prefill_chunk_len, config.max_num_requests))

    def _scheduler_config(self) -> SchedulerConfig:
        assert self.config.prefill_chunk_len is not None
        return SchedulerConfig(
            num_blocks=self.memory.num_blocks, block_size=self.config.block_size,
            max_model_len=self.memory.max_model_len,
            prefill_chunk_len=self.config.prefill_chunk_len,
            max_num_requests=self.config.max_num_requests,
            dense_tail_len=self.sparsity_plan.dense_tail_len if self.sparsity_plan else 0)


def _report_progress(sessions: Sequence[Session], on_progress: OnProgress | None) -> None:
    for session in sessions:
        while session.events:
            event = session.events.popleft()
            if on_progress is not None and isinstance(event, Progress):
                on_progress(event)
