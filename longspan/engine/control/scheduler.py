"""Decides which tokens of which requests the next step computes. No torch, no sockets.

A request is *waiting* until it has KV blocks, then *running*: in prefill until its prompt is
computed, in decode until it is finished. `Scheduler.schedule` makes a step in two moves:

- *Admit* waiting requests, first come, first served, while KV blocks and places last. A request
  takes blocks for its prompt and for all of ``max_tokens``, so it always finishes once admitted:
  nothing is preempted, and no million-token prefill is ever thrown away. A short request may
  overtake a long one that waits for blocks, but only `LOOKAHEAD` times, so that the long one is not
  starved. A request whose prompt begins as one in prefill waits for those blocks instead of
  computing them a second time (`longspan.engine.control.prefixes`).
- *Plan* the step: a token for every request in decode, then as much prefill as the step's time
  allows (`longspan.engine.control.planner`). Steps that only decode and are shorter than the way to
  the runner are sent several at a time.

`Scheduler.apply` takes the results, in the order of the steps: it appends tokens, registers blocks
with the prefix cache, and ends requests. A request that could never fit is refused by
`Scheduler.add`.

Several steps may be in flight, for `schedule` only looks at ``scheduled_len``. A request whose next
token is still being sampled goes on all the same: its slice says so, and the runner, which has the
token, feeds it in. Only a stop token comes as a surprise. The slices that are in flight by then are
computed for nothing, `apply` drops their tokens, and the blocks come back with the last of them.
Steps run in the order of their submission, so a block that is given away after an interrupt is
written by its new owner after the old one's last step.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from longspan.engine.control.blocks import BlockPool
from longspan.engine.control.chunking import side_room
from longspan.engine.control.copy_queue import TierConfig
from longspan.engine.control.latency import Costs, Forecast, LatencyModel, Work
from longspan.engine.control.planner import Planner, PlannerConfig, StepPlan
from longspan.engine.control.prefixes import Prefixes
from longspan.engine.control.slices import make_update, note_scheduled, scheduled_slice
from longspan.engine.control.tiers import Loading, Tiers
from longspan.engine.request import FinishReason, Request, check_fits, conclude
from longspan.engine.step import (
    RowLogprobs,
    SamplingExtras,
    ScheduledBatch,
    ScheduledSlice,
    StepResult,
    Update,
)

LOOKAHEAD = 16
"""Waiting requests that are tried, and times that a request may be overtaken."""
MAX_REPEATS = 8
"""Most decode steps that are sent at a time."""
NOTHING = StepPlan(slices=(), work=Work(), expected_s=0.0)
"""The plan of a step that only copies, or waits for copies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig(PlannerConfig):
    """An engine's sizes and times, as its scheduler needs them."""

    num_blocks: int
    max_model_len: int
    max_num_requests: int
    prior: Costs = Costs()
    """Costs of steps before any was measured."""
    sparse_above: int | None = None
    """Longer prompts prefill sparsely. Forecasts need it; a request knows its own mode."""
    burst_s: float = 0.0
    """Steps that only decode are sent in bursts of up to this duration, seconds."""
    self_measurement_len: int = 0
    """Longest prompt of a server's `self_measurement`, tokens; 0: it does not measure itself."""
    warms_sparse: bool = True
    """It computes a sparse prompt too: the first one has kernels to prepare."""
    tiers: TierConfig = TierConfig()
    """What there is of the prefix cache besides the device's blocks."""

    @property
    def longest_len(self) -> int:
        """Longest prompt plus completion that can be accepted, tokens."""
        return min(self.max_model_len, self.num_blocks * self.block_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How much work a scheduler has at one moment."""

    num_waiting: int = 0
    """Requests without KV blocks."""
    num_running: int = 0
    """Requests in prefill or decode."""
    num_waiting_tokens: int = 0
    """Prompt tokens of the waiting requests."""
    num_used_tokens: int = 0
    """Tokens of KV reserved for running requests, in whole blocks."""
    num_unwritten_tokens: int = 0
    """Tokens of KV on their way to disk."""
    forecast: Forecast | None = None
    """How long prompts will take, as known after the latest prefill; None: nothing was measured."""


@dataclass(slots=True)
class InFlightStep:
    """A step that was handed out and whose result has not come."""

    batch: ScheduledBatch
    plan: StepPlan
    """Its slices become the batch's, in the same order."""
    prefills: bool
    """Some slice computes prompt tokens."""
    submitted_s: float = 0.0
    """When the loop handed it to the runner, by ``time.monotonic``."""
    launched_s: float = 0.0
    """When the runner had taken it: with a device in this process, when all of it was queued."""


class Scheduler:
    """Owns the requests and the blocks; `schedule` hands out work, `apply` takes results."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._waiting: list[Request] = []
        """Requests without KV blocks, in the order of their arrival."""
        self._running: dict[str, Request] = {}
        """Requests in prefill or decode, in the order of admission. Finished ones stay until no
        step in flight writes their blocks."""
        self.in_flight = deque[InFlightStep]()
        """Steps handed out whose results have not come, oldest first."""
        self.pool = BlockPool(config.num_blocks)
        self.latency = LatencyModel(config.prior)
        """Fitted by every step whose time is known."""
        self.forecast: Forecast | None = None
        """How long prompts will take, as known after the latest prefill."""
        self._planner = Planner(config, self.latency)
        self._prefixes = Prefixes(config, self.pool, self.latency)
        self.tiers = Tiers(
            config.tiers, self.pool, key=config.cache_key, block_size=config.block_size)
        self._updates: list[Update] = []
        self._free_slots = list(range(config.max_num_requests))
        self._num_steps = 0
        self.epoch = 0
        """Number of times that `drop_in_flight` was called."""

    @property
    def is_idle(self) -> bool:
        """No request is waiting or running, no step in flight, no update uncollected, and no block
        on its way to another place."""
        return not (self._waiting or self._running or self.in_flight or self._updates
                    ) and self.tiers.is_idle

    @property
    def num_requests(self) -> int:
        """Requests waiting or running."""
        return len(self._waiting) + len(self._running)

    @property
    def load(self) -> Load:
        """The work that there is now."""
        num_used = self.pool.num_blocks - self.pool.num_available
        return Load(
            num_waiting=len(self._waiting), num_running=len(self._running),
            num_waiting_tokens=sum(request.prompt_len for request in self._waiting),
            num_used_tokens=num_used * self.config.block_size, forecast=self.forecast,
            num_unwritten_tokens=self.tiers.num_unwritten * self.config.block_size)

    def add(self, request: Request) -> None:
        """Queue a request. Raises `PromptTooLongError` if it could never be computed."""
        check_fits(request.prompt_len, request.params.max_tokens, self.config.longest_len)
        self._waiting.append(request)

    def abort(self, request_id: str) -> None:
        """Cancel a request in any state; unknown and finished ones are ignored.

        Its blocks become available when the last step in flight that writes them has returned.
        """
        waiting = next((r for r in self._waiting if r.request_id == request_id), None)
        if waiting is not None:
            self._waiting.remove(waiting)
        request = waiting or self._running.get(request_id)
        if request is not None and not request.is_finished:
            self._abort(request)

    def schedule(self, in_flight_s: float = 0.0) -> ScheduledBatch | None:
        """Make the next step; None when nothing can be computed now.

        Args:
            in_flight_s: predicted time until the steps in flight that prefill are computed; they
                share the step's time.
        """
        self._admit()
        running = [request for request in self._running.values()
                   if not (request.is_finished or request.num_transfers)]
        plan = self._planner.plan(running, in_flight_s)
        transfers, seen = self.tiers.next_transfers()
        if plan is None:
            # A step that computes nothing brings news of copies, unless another one will.
            if not transfers and (self.in_flight or not self.tiers.is_waiting):
                assert self.in_flight or not self._waiting, "an empty engine admits any request"
                return None
            plan = NOTHING
        repeats = self._num_repeats(plan)
        batch = ScheduledBatch(
            step_id=self._num_steps, epoch=self.epoch, expected_s=repeats * plan.expected_s,
            slices=tuple(map(scheduled_slice, plan.slices)), repeats=repeats,
            transfers=transfers, seen=seen)
        for planned in plan.slices:
            note_scheduled(planned, repeats)
        self._num_steps += 1
        self.in_flight.append(InFlightStep(batch, plan, batch.prefills))
        return batch

    def apply(self, result: StepResult) -> list[Update]:
        """Take the result of the oldest step in flight, and return what changed, aborts included.

        A result of an earlier epoch changes nothing.
        """
        if result.epoch != self.epoch:
            return self.take_updates()
        for loading in self.tiers.take(result.transfers):
            self._end_loading(loading)
        step = self.in_flight.popleft()
        batch = step.batch
        assert result.step_id == batch.step_id, "results are applied in the order of their steps"
        samples = [item.sampling is not None for item in batch.slices]
        num_rows = sum(samples)
        assert len(result.token_ids) == batch.repeats * num_rows, "a token for each that samples"
        row = 0
        for item, planned, is_sampled in zip(batch.slices, step.plan.slices, samples, strict=True):
            sampled = result.token_ids[row::num_rows] if is_sampled else (None,)
            logprobs = result.logprobs[row] if is_sampled and result.logprobs else None
            self._apply_slice(planned.request, item, sampled, logprobs, result.failure(row))
            row += is_sampled
        self._learn(step, result.elapsed_s)
        return self.take_updates()

    def drop_in_flight(self) -> None:
        """Forget the steps in flight after an interrupt: their requests are aborted, and results
        that still come belong to an earlier epoch."""
        self.epoch += 1
        self.tiers.resend()
        for step in self.in_flight:
            for request in (planned.request for planned in step.plan.slices):
                request.num_in_flight = 0
                if not request.is_finished:
                    self._abort(request)
                elif request.request_id in self._running:
                    self._release(request)
        self.in_flight.clear()

    def take_updates(self) -> list[Update]:
        """Hand out the changes that were not handed out yet."""
        updates, self._updates = self._updates, []
        return updates

    def check(self) -> None:
        """Assert that blocks and requests agree; cheap enough for every idle moment."""
        self.pool.check()
        self._prefixes.check(self._waiting)
        self.tiers.check()
        held = {block for request in self._running.values() for block in request.block_ids}
        held |= self.tiers.held_blocks()
        assert len(held) == self.pool.num_blocks - self.pool.num_available, "blocks leaked"
        assert not any(request.block_ids for request in self._waiting)
        slots = [*self._free_slots, *(request.slot for request in self._running.values())]
        assert sorted(slots) == list(range(self.config.max_num_requests)), "slots leaked"

    # -- admit ---------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Move waiting requests to running while blocks and places last."""
        position = num_blocked = 0
        while (position < len(self._waiting) and num_blocked < LOOKAHEAD
               and len(self._running) < self.config.max_num_requests):
            request = self._waiting[position]
            if self._prefixes.must_wait(request):
                position += 1
            elif self._allocate(request):
                del self._waiting[position]
                request.slot = heappop(self._free_slots)
                request.has_extras = SamplingExtras.of(request) is not None
                self._running[request.request_id] = request
                for overtaken in self._waiting[:position]:
                    overtaken.num_overtaken += not overtaken.awaited_hash
            elif request.num_overtaken >= LOOKAHEAD:
                return
            else:
                position, num_blocked = position + 1, num_blocked + 1

    def _allocate(self, request: Request) -> bool:
        """Take all blocks that a request can ever need, cached ones first; False if too few are
        left."""
        cached = self._prefixes.known_blocks(request)
        num_new = -(-request.reserved_len // self.config.block_size) - len(cached)
        room = self.pool.num_available - num_new
        if room < 0 or room < self.pool.num_cached(cached):
            return False
        known = self._prefixes.known_places(request, cached, self.tiers)
        held = [block for block in known if block >= 0]
        self.pool.acquire(held)
        num_new += len(cached) - len(held)
        new = self.pool.allocate(num_new, behind=cached)
        assert new is not None, "they were counted"
        fresh = iter(new)
        request.block_ids = array("i", [block if block >= 0 else next(fresh) for block in known])
        request.block_ids.extend(fresh)
        request.num_registered = len(cached)
        cached_len = len(cached) * self.config.block_size
        request.num_cached_tokens = request.scheduled_len = request.computed_len = cached_len
        self._prefixes.promise(request)
        self.tiers.begin(request, known, len(cached))
        return True

    def _end_loading(self, loading: Loading) -> None:
        """Go on with a request whose blocks were copied, all or in vain."""
        request = loading.request
        if request.is_finished:
            self._release(request)
        elif loading.has_failed:
            self._prefixes.forget(request)
            self._release(request)
            request.num_registered = 0
            self._waiting.insert(0, request)
        elif loading.num_host or loading.num_disk:
            request.loading_len = 0
            length = loading.stop * self.config.block_size
            request.num_cached_tokens = request.scheduled_len = request.computed_len = length
            request.origin = loading.origin(self.config.block_size)
            self._prefixes.register(request)

    # -- plan ----------------------------------------------------------------------------------

    def _num_repeats(self, plan: StepPlan) -> int:
        """Decide how many steps of a plan are sent at a time. Longer bursts would make requests
        that arrive wait, and compute more in vain behind a stop token."""
        requests = [planned.request for planned in plan.slices]
        if not requests or any(r.is_prefill or r.has_extras for r in requests):
            return 1
        fitting = self.config.burst_s / plan.expected_s if plan.expected_s > 0 else MAX_REPEATS
        left = min(request.num_unscheduled for request in requests)
        return max(1, min(MAX_REPEATS, int(fitting), left))

    # -- apply ---------------------------------------------------------------------------------

    def _apply_slice(
        self, request: Request, item: ScheduledSlice, samples: Sequence[int | None],
        logprobs: RowLogprobs | None, failure: str,
    ) -> None:
        """Take what one slice sampled, one token after another.

        Args:
            samples: as `conclude` takes them.
            failure: why a sampling failed, if one did.
        """
        request.num_in_flight -= 1
        is_whole = item.pieces is None or item.pieces.is_last
        if request.is_finished:  # stopped or aborted while the step was in flight
            is_good = all(sampled is None or sampled >= 0 for sampled in samples)
            if is_whole and is_good and item.cached_len == request.computed_len < item.prompt_len:
                request.computed_len = item.done_len  # computed, if not for this request
                self._prefixes.register(request)
                self.tiers.note(request, is_over=True)
            self._release(request)
            return
        for done_len, sampled in enumerate(samples, item.done_len):
            token, reason = conclude(
                request.params, request.eos_token_ids, sampled, len(request.output_ids))
            if reason != "abort":  # else nothing that this slice wrote may be shared
                request.computed_len = done_len if is_whole else request.computed_len
                if token is not None:
                    request.output_ids.append(token)
                self._prefixes.register(request)
                self.tiers.note(request)
            if reason is not None:
                self._finish(request, reason)
            self._updates.append(make_update(
                request, token, logprobs, done_len, failure if reason == "abort" else ""))
            if reason is not None:
                return

    def _learn(self, step: InFlightStep, elapsed_s: float) -> None:
        # The head on all rows, for log-probabilities of prompts, is no part of the model.
        if not (step.prefills and any(item.scored for item in step.batch.slices)):
            self.latency.observe(step.plan.work, elapsed_s / step.batch.repeats)
        if step.prefills and self.latency.num_observations:
            config = self.config
            self.forecast = Forecast(
                costs=self.latency.costs, block_size=config.block_size,
                prefill_chunk_len=config.prefill_chunk_len, sparse_above=config.sparse_above,
                tail_len=config.tail_len, num_stages=config.num_stages)

    def _abort(self, request: Request) -> None:
        self._finish(request, "abort")
        self._updates.append(make_update(request, None, None, request.computed_len))

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        self._prefixes.forget(request)
        self.tiers.note(request, is_over=True)
        self.tiers.cancel(request)
        self._release(request)

    def _release(self, request: Request) -> None:
        """Give the blocks of a finished request back, once no step in flight writes them."""
        if not (request.num_in_flight or request.num_transfers
                ) and request.request_id in self._running:
            del self._running[request.request_id]
            heappush(self._free_slots, request.slot)
            self.pool.release(request.block_ids)
            request.block_ids = array("i")


def max_step_tokens(prefill_chunk_len: int, max_num_requests: int) -> int:
    """Return the largest number of tokens that one step holds on the device: a prefill chunk (the
    head's, or a paused one), tokens of others beside it, one token of each request in decode."""
    others = side_room(prefill_chunk_len) if max_num_requests > 1 else 0
    return prefill_chunk_len + others + max_num_requests
