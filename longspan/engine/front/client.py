"""`AsyncEngine`: an engine for asyncio programs, such as the HTTP server. No torch.

The engine itself runs elsewhere: a scheduler and a runner, each a process of its own
(`longspan.engine.processes.launch`). Only the messages of `longspan.engine.processes.wire` pass
between, and sampled tokens come straight from the runner. On the event loop updates are delivered
to the requests that wait for them, and tokens become text, some 20 microseconds for each token.
Work that takes longer (tokenising, templates, checks of a million ids) is done on a few helper
threads; JSON schemas go their own way (`longspan.engine.front.constraints`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, ParamSpec, TypeVar

from longspan.config import EngineConfig
from longspan.engine.control.latency import Forecast
from longspan.engine.control.prefixes import hash_prompt
from longspan.engine.control.scheduler import Load
from longspan.engine.front.constraints import Constraints
from longspan.engine.front.stream import Channel, Stream
from longspan.engine.front.text_work import decode, load_text
from longspan.engine.front.tracking import (
    Tracker,
    deliver,
    deliver_recalls,
    deliver_scores,
    updates,
)
from longspan.engine.intake import Prompt
from longspan.engine.processes.backend import Backend, Start
from longspan.engine.processes.launch import in_processes
from longspan.engine.processes.wire import (
    Abort,
    Add,
    Begin,
    Described,
    FromEngine,
    LoadChanged,
    Loaded,
    Prepare,
    Prepared,
    Stepped,
    Submitted,
)
from longspan.engine.request import PromptLogprobs, Request, SamplingParams, TokenLogprob
from longspan.engine.resolve import model_name
from longspan.engine.step import StepReport, Update
from longspan.engine.text.call_format import CallFormat
from longspan.engine.text.completion import Completion
from longspan.engine.text.token_bytes import TokenBytes
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import LongspanError

NUM_HELPERS = 4
CLOSE_TIMEOUT_S = 30.0
"""Longest wait when an engine closes; one on a thread ends after its step, or its loading."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
EngineState = Literal["loading", "ready", "draining", "dead"]
logger = logging.getLogger("longspan.engine")


class EngineUnavailableError(LongspanError):
    """The engine is loading, stopping or dead."""

    http_status = 503


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """One completion to compute."""

    request_id: str
    """The ``request_id`` of the request's events."""
    prompt: Prompt
    """Text, or token ids."""
    params: SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStatus:
    """A cheap snapshot, kept up to date by the engine's messages."""

    state: EngineState
    reason: str = ""
    """Why the engine is dead, or what it is loading."""
    is_mendable: bool = False
    """The engine is dead, and ``reason`` tells a person what to do about it."""
    model: str = ""
    """The model's name, as clients should write it."""
    max_model_len: int = 0
    """Longest prompt plus completion, tokens."""
    capacity_tokens: int = 0
    """Tokens that the KV cache holds."""
    num_waiting: int = 0
    """Requests without KV blocks."""
    num_running: int = 0
    """Requests in prefill or decode."""
    num_waiting_tokens: int = 0
    """Prompt tokens of the waiting requests."""
    num_used_tokens: int = 0
    """Tokens of KV in use by running requests."""
    num_unwritten_tokens: int = 0
    """Tokens of KV on their way to disk."""
    keeps_on_disk: bool = False
    """KV goes to disk."""
    latency: Forecast | None = None
    """How long prompts will take, learned from the steps so far; None: nothing was measured yet."""
    ranks: str = ""
    """How many ranks there are and what they share; empty: there is one."""
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of weights, workspace and KV cache."""
    prefill_chunk_len: int = 0
    """Prompt tokens of one request computed in one step."""
    max_num_requests: int = 0
    """Requests computed together at the most."""
    sizes_reason: str = ""
    """Why these two are not larger; empty: they are as asked for, or as large as they get."""
    default_sampling: Mapping[str, float] = field(default_factory=dict)
    """Sampling fields that the checkpoint recommends."""
    call_format: CallFormat | None = None
    """How the model writes tool calls; None: it takes no tools."""


class AsyncEngine:
    """One engine and the requests given to it. All methods belong to the event loop of `start`.

    Args:
        start: starts the engine; None: in processes. Benchmarks pass a synchronous one
            (`in_processes(max_in_flight=1)`), tests a double.
    """

    def __init__(self, config: EngineConfig, start: Start | None = None) -> None:
        name = model_name(config.model)
        self._status = EngineStatus(state="loading", model=name, reason=f"loading {name}",
                                    ranks=config.ranks_label)
        self._config, self._start = config, start or in_processes()
        self._described: Described | None = None
        self._tokenizer: Tokenizer | None = None
        self._constraints: Constraints | None = None
        self._channels = dict[str, Channel]()
        self._completions = dict[str, Completion]()
        self._trackers = dict[str, Tracker]()
        self._epoch = 0
        self._missing = {"scheduler", "runner", "text"}
        self._numbers = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()
        self._helpers = ThreadPoolExecutor(NUM_HELPERS, thread_name_prefix="longspan-text")
        self._backend: Backend | None = None

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin loading and return at once; `status` tells when it is ready or has failed."""
        assert self._backend is None, "an engine starts once"
        self._loop = asyncio.get_running_loop()
        self._backend = self._start(self._config, self._post)

    def status(self) -> EngineStatus:
        """Return the present state; never waits."""
        return self._status

    async def drain(self) -> None:
        """Take no further requests; returns when the accepted ones are finished."""
        if self._status.state != "dead":
            self._status = replace(self._status, state="draining", reason="")
        await self._idle.wait()

    def cut_off(self) -> None:
        """Cancel all requests; what is finished of their prompts stays in the prefix cache."""
        for engine_id, channel in list(self._channels.items()):
            channel.fail(EngineUnavailableError(_last_words("it was shut down")))
            self._cancel(engine_id)

    async def close(self) -> None:
        """Abort everything and end the engine: processes at once, a thread after its step."""
        self._die("it was shut down")
        if self._backend is not None:
            await asyncio.to_thread(self._backend.join, CLOSE_TIMEOUT_S)

    # -- requests ------------------------------------------------------------------------------

    async def add(self, request: GenerateRequest) -> Stream:
        """Hand in a request. Returns once it is accepted, before anything is computed.

        The stream gives `Progress` at once, when the prefix cache supplied tokens and after each
        prefill chunk, then `TokenEvent`s, the last of them with a finish reason. Closing the
        stream, losing it, or cancelling this call aborts the request.

        Raises:
            InvalidRequestError: the prompt is empty, a token id is not in the vocabulary, or the
                JSON schema cannot be followed.
            PromptTooLongError: prompt and completion do not fit.
            EngineUnavailableError: loading, draining or dead. The stream raises it too, when the
                engine dies.
        """
        tokenizer = self._ready_tokenizer()
        if request.params.constraint is not None:
            assert self._constraints is not None
            await self._constraints.admit(request.params.constraint)
            self._ready_tokenizer()  # it may have died meanwhile
        made = await self._aside(self._make, request, tokenizer)
        self._ready_tokenizer()  # it may have died meanwhile
        # Nothing is awaited from here on, so that a request is either handed in or not.
        return self._open(made, Completion(made, tokenizer))

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        """Encode a text as token ids."""
        encode = self._loaded_tokenizer().encode
        return await self._aside(encode, text, add_special_tokens=add_special_tokens)

    async def detokenize(self, token_ids: Sequence[int], *, with_special: bool = False) -> str:
        """Decode token ids as `Tokenizer.decode` does. Raises `InvalidRequestError` for ids that do
        not exist."""
        return await self._aside(decode, self._loaded_tokenizer(), token_ids, with_special)

    async def describe(
        self, token_ids: Sequence[int], found: PromptLogprobs
    ) -> Sequence[TokenLogprob]:
        """Log-probabilities of a prompt's tokens as those of completions are, NaN included."""
        token_bytes = TokenBytes(self._loaded_tokenizer())
        return await self._aside(token_bytes.describe_all, token_ids, found)

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], /, **options: Any
    ) -> Sequence[int]:
        """Encode a conversation by the checkpoint's template, as `Tokenizer.encode_chat` does."""
        encode = self._loaded_tokenizer().encode_chat
        return await self._aside(partial(encode, **options), messages)

    def _make(self, request: GenerateRequest, tokenizer: Tokenizer) -> Request:
        """Make the engine's request; runs on a helper thread."""
        assert self._described is not None
        prompt = request.prompt
        if isinstance(prompt, str):
            prompt = tokenizer.encode(prompt, add_special_tokens=True)
        made = self._described.intake.make(
            request.request_id, prompt, request.params, tokenizer.eos_token_ids)
        hash_prompt(made, self._described.scheduler)
        return made

    def _open(self, made: Request, completion: Completion) -> Stream:
        # Callers may use an id again before the engine has seen the end of its first owner.
        engine_id = f"{made.request_id}/{next(self._numbers)}"
        request = replace(made, request_id=engine_id, prompt_ids=made.prompt_ids[:])
        self._send(Add(request))  # first, so that nothing waits for what cannot be sent
        channel = self._channels[engine_id] = Channel(completion)
        self._completions[engine_id] = completion
        self._trackers[engine_id] = Tracker(request)
        self._idle.clear()
        return Stream(channel, partial(self._cancel, engine_id), self._loop)

    def _cancel(self, engine_id: str) -> None:
        if engine_id in self._channels:
            self._send(Abort(engine_id))
            self._forget(engine_id)

    def _forget(self, engine_id: str) -> None:
        self._channels.pop(engine_id, None)
        self._completions.pop(engine_id, None)
        self._trackers.pop(engine_id, None)
        if not self._channels:
            self._idle.set()

    def _ready_tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises unless requests are taken."""
        tokenizer = self._loaded_tokenizer()
        if self._status.state == "draining":
            raise EngineUnavailableError("the engine is stopping; it takes no further requests")
        return tokenizer

    def _loaded_tokenizer(self) -> Tokenizer:
        if self._status.state == "dead":
            raise EngineUnavailableError(_last_words(self._status.reason))
        if self._tokenizer is None or self._status.state == "loading":
            raise EngineUnavailableError("the model is being loaded; try again shortly")
        return self._tokenizer

    async def _aside(
        self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        return await self._loop.run_in_executor(self._helpers, partial(work, *args, **kwargs))

    # -- messages of the engine ----------------------------------------------------------------

    def _post(self, message: FromEngine) -> None:
        """Take a message of the engine, on one of its threads."""
        try:
            self._loop.call_soon_threadsafe(self._receive, message)
        except RuntimeError:  # the event loop has ended without `close`
            if self._backend is not None:
                self._backend.stop()

    def _send(self, message: Begin | Add | Abort | Prepare) -> None:
        assert self._backend is not None
        self._backend.send(message)

    def _receive(self, message: FromEngine) -> None:
        if self._status.state == "dead":
            return
        if isinstance(message, Stepped):
            self._deliver(message)
        elif isinstance(message, LoadChanged):
            self._note_load(message.load)
            self._arrive("scheduler")
        elif isinstance(message, Submitted):
            self._admit(message)
        elif isinstance(message, Described):
            self._take_description(message)
        elif isinstance(message, Loaded):
            self._arrive("runner")
        elif isinstance(message, Prepared):
            assert self._constraints is not None
            self._constraints.arrive(message.constraint)
        else:
            self._die(message.reason, is_mendable=message.is_mendable)

    def _take_description(self, described: Described) -> None:
        self._described = described
        self._constraints = Constraints(described.path, described.intake.vocab_size, self._send)
        self._send(Begin(described.scheduler))
        config = described.scheduler
        self._status = replace(
            self._status, max_model_len=described.intake.max_model_len,
            capacity_tokens=config.num_blocks * config.block_size,
            memory_bytes=described.memory_bytes, sizes_reason=described.sizes_reason,
            prefill_chunk_len=config.prefill_chunk_len,
            max_num_requests=config.max_num_requests, keeps_on_disk=bool(config.tiers.folder))
        # The tokenizer is loaded while the engine reads the weights.
        self._text_loaded = asyncio.ensure_future(
            self._aside(load_text, described.path, described.intake.vocab_size))
        self._text_loaded.add_done_callback(self._take_text)

    def _take_text(self, loaded: asyncio.Future[tuple[Tokenizer, dict[str, float]]]) -> None:
        if loaded.cancelled():
            return
        error = loaded.exception()
        if self._status.state == "dead":
            return  # for another reason, which ended the helpers too
        if error is None:
            self._tokenizer, advice = loaded.result()
            self._status = replace(self._status, default_sampling=advice,
                                   call_format=self._tokenizer.call_format)
            self._arrive("text")
        elif isinstance(error, LongspanError):
            self._die(" ".join(str(error).split()), is_mendable=True)
        else:
            logger.error("the tokenizer cannot be loaded", exc_info=error)
            self._die(f"the tokenizer cannot be loaded ({type(error).__name__}: {error})")

    def _arrive(self, part: Literal["scheduler", "runner", "text"]) -> None:
        """Note that a part of the engine is there; when all are, requests are taken."""
        self._missing.discard(part)
        if not self._missing and self._status.state == "loading":
            self._status = replace(self._status, state="ready", reason="")

    def _note_load(self, load: Load) -> None:
        self._status = replace(
            self._status, num_waiting=load.num_waiting, num_running=load.num_running,
            num_waiting_tokens=load.num_waiting_tokens, num_used_tokens=load.num_used_tokens,
            num_unwritten_tokens=load.num_unwritten_tokens,
            latency=load.forecast or self._status.latency)

    def _admit(self, message: Submitted) -> None:
        for engine_id, num_cached_tokens in message.prefills:
            if engine_id in self._channels:
                self._completions[engine_id].admit(num_cached_tokens)
                self._channels[engine_id].wake()

    def _deliver(self, message: Stepped) -> None:
        result = message.result
        if result.epoch < self._epoch:
            return
        self._epoch = result.epoch
        report = StepReport(
            submitted_s=message.started_s, finished_s=message.finished_s,
            kept_pairs=result.kept_pairs, causal_pairs=result.causal_pairs)
        deliver_scores(self._completions, result.prompt_logprobs)
        deliver_recalls(self._completions, result.recalls)
        for update in updates(message, self._trackers):
            self._push(update, report)

    def _push(self, update: Update, report: StepReport) -> None:
        engine_id = update.request_id
        channel = self._channels[engine_id]
        deliver(self._completions, update, report, lambda name: self._send(Abort(name)))
        channel.wake()
        if channel.is_over:
            self._forget(engine_id)

    def _die(self, reason: str, *, is_mendable: bool = False) -> None:
        if self._status.state == "dead":
            return
        self._note_load(Load())
        self._status = replace(self._status, state="dead", reason=reason, is_mendable=is_mendable)
        for channel in self._channels.values():
            channel.fail(EngineUnavailableError(_last_words(reason)))
        for held in (self._channels, self._completions, self._trackers):
            held.clear()
        self._idle.set()
        self._helpers.shutdown(wait=False)
        if self._constraints is not None:
            self._constraints.close()
        if self._backend is not None:
            self._backend.stop()


def _last_words(reason: str) -> str:
    return f"the engine has stopped: {reason}"
