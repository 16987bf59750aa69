"""Chooses what the next step computes of each request, so that the step fits its time. No torch.

The rule, for each step:

1. Every request in decode gets its token.
2. The *head*, the prompt that was admitted first, is sure of half of the remaining time. The other
   half goes to the other prompts, the one with the shortest predicted rest first; the head takes
   what they leave. Work comes in units, so the head may get less than its half: the next steps owe
   it the difference.
3. Something is always computed: the head gets one unit (a piece of a sparse chunk, or
   ``unit_len`` dense tokens) even where that exceeds the time. And never less than takes as long as
   what every step costs besides: on a busy machine, where that alone is the budget, prompts would
   otherwise be computed in crumbs.

So a short prompt waits for the step that runs and is computed in the next one, if half a step
suffices. The head takes at most twice the time that it would need alone, decodes not counted, and
every prompt becomes the head when those before it are finished: none starves. A step takes its
budget at most, or one unit or twice its fixed cost where that is longer; a share of the budget
(`SLACK`) is left free for errors of prediction, and a step has at most twice the work of a sparse
chunk that one had before.

One sparse chunk at a time may be paused, because its hidden states stay on the device; another
prompt's sparse chunk begins when it is complete. Where several prompts want to begin one, the head
and the shortest other take turns.

**Pipelines.** Each step passes through the stages behind the one before it, and costs are those of
the slowest stage. A token passes behind one step on every stage, so each gets a share of the
budget, and steps in flight, which are on other stages, take nothing of it. A request decodes again
when its token is back; beside prompts the next steps are without it. Sparse chunks are not paused:
the ladder keeps them short. Dense prompts are cut by a plan for the whole of them
(`longspan.engine.control.stage_plan`), made when they begin.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from longspan.engine.control.chunking import chunk_pieces, chunk_stop, side_room, tail_start
from longspan.engine.control.ladder import Ladder
from longspan.engine.control.latency import (
    Costs,
    LatencyModel,
    SparseTerms,
    Terms,
    Work,
    add_terms,
    chunk_work,
    dense_terms,
    piece_terms,
    sparse_terms,
)
from longspan.engine.control.stage_plan import DenseCosts, plan_dense
from longspan.engine.request import Request
from longspan.engine.step import Pieces, ScoredTokens

SLACK = 0.3
"""Share of a step's budget that is left free for errors of prediction."""
UNLIMITED_S = 1e9
FLOOR = 2.0
"""The head's share of a step takes this many times the step's fixed cost, even where the budget
allows less: the work is half of it then."""
SHORTEST_CHUNK = 1_024
"""Least length of a planned dense chunk, tokens: shorter ones take as long on a GPU."""
FAR = 4
"""Dense slices get half the time where their history is more than this many times the longest one
measured: costs that far in are a guess."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerConfig:
    """The sizes and times by which prompts are cut into steps."""

    block_size: int
    prefill_chunk_len: int
    num_stages: int = 1
    """Stages of layers through which steps pass one behind another."""
    fixed_chunks: bool = False
    """A pipeline cuts prompts as one device does, for comparison: into chunks of
    ``prefill_chunk_len``."""
    tail_len: int = 0
    """Last tokens of a sparse prompt that are a prefill chunk of their own."""
    num_layers: int = 1
    piece_rows: int = 1 << 30
    """Rows of one piece of a sparse chunk."""
    unit_len: int = 1
    """Dense slices end at multiples of this, tokens: shorter ones would take as long."""
    step_budget_s: float | None = None
    """Longest step that prefills, seconds; None: prefill chunks are computed whole."""
    cache_key: bytes = b""
    """What every block's content depends on besides tokens; part of all hashes."""

    @property
    def ladder(self) -> Ladder:
        """Lengths of sparse prefill chunks."""
        return Ladder(longest=self.prefill_chunk_len,
                      num_stages=1 if self.fixed_chunks else self.num_stages,
                      block_size=self.block_size)


class PlannedSlice(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the next step computes of one request."""

    request: Request
    query_len: int
    pieces: Pieces | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """What the next step computes."""

    slices: tuple[PlannedSlice, ...]
    """Prefills, a sparse chunk in pieces first of all, then decodes."""
    work: Work
    expected_s: float


class Planner:
    """Chooses the work of each step."""

    def __init__(self, config: PlannerConfig, latency: LatencyModel) -> None:
        self._config, self._latency = config, latency
        budget_s = config.step_budget_s
        self._target_s = UNLIMITED_S if budget_s is None else (
            (1 - SLACK) * budget_s / config.num_stages)
        self._ends = dict[str, tuple[int, ...]]()
        """Where the chunks of a dense prompt end, by the request's id; pipelines alone."""
        self._last_owner = ""
        """Id of the request that began a sparse chunk last."""
        self._debt = ("", 0.0)
        """Id of the head, and the time that is owed to it, seconds."""

    def plan(self, running: Sequence[Request], in_flight_s: float) -> StepPlan | None:
        """Plan the next step; None when there is nothing to compute now.

        Args:
            running: unfinished requests in the order of admission.
            in_flight_s: predicted time of the steps in flight that prefill; they share the budget.
        """
        decodes = [request for request in running if request.can_decode]
        prefills = [request for request in running if request.is_prefill]
        if self._config.num_stages > 1 and not self._config.fixed_chunks and prefills:
            in_flight_s = 0.0
            decodes = [request for request in decodes if not request.num_in_flight]
            self._cut(prefills)
        step = _PlanBuilder(self._config, self._latency, decodes, self._ends)
        if prefills:
            room_s = self._target_s - in_flight_s - step.expected_s
            if room_s > 0 or not in_flight_s:
                self._fill(step, prefills, room_s, must_progress=not in_flight_s)
        return step.finish()

    def _cut(self, prefills: Sequence[Request]) -> None:
        """Plan the dense prompts that are new; forget those that are through."""
        config, costs = self._config, self._latency.costs.dense
        stages = config.num_stages
        known, self._ends = self._ends, {}
        for request in prefills:
            ends = known.get(request.request_id)
            if ends is None and not request.sparse:
                ends = plan_dense(DenseCosts(
                    terms=(costs[0], stages * costs[1], stages * costs[2]),
                    stage_shares=(1 / stages,) * stages, unit_len=config.block_size,
                    shortest=min(SHORTEST_CHUNK, config.prefill_chunk_len),
                    longest=config.prefill_chunk_len), request.scheduled_len, request.prompt_len)
            if ends is not None:
                self._ends[request.request_id] = ends

    def _fill(
        self, step: _PlanBuilder, prefills: Sequence[Request], room_s: float, *,
        must_progress: bool,
    ) -> None:
        """Share ``room_s`` seconds among the prompts, by the rule above."""
        owner = self._chunk_owner(prefills)
        # The others' sparse chunks have to wait for the owner's.
        ready = [r for r in prefills if r is owner or not r.sparse]
        head, others = ready[0], ready[1:]
        begins = owner is not None and owner.num_pieces == 0
        step.has_chunk = owner is not None
        reserve_s, before_s = 0.0, step.expected_s
        if others:
            others.sort(key=self._rest_s)
            reserve_s = min(room_s / 2 + self._owed(head), self._rest_s(head))
        for request in others:
            step.take(request, room_s - reserve_s - (step.expected_s - before_s))
        others_s = step.expected_s - before_s
        step.take(head, room_s - others_s, is_head=True, must_progress=must_progress)
        head_s = step.expected_s - before_s - others_s
        owed_s = self._owed(head) + (others_s - head_s) / 2
        self._debt = head.request_id, max(0.0, min(room_s / 2, owed_s))
        if begins and owner is not None and step.holds(owner):
            self._last_owner = owner.request_id

    def _owed(self, head: Request) -> float:
        """Return the time by which the head is behind its half, seconds."""
        return self._debt[1] if self._debt[0] == head.request_id else 0.0

    def _chunk_owner(self, prefills: Sequence[Request]) -> Request | None:
        """Find the request whose sparse chunk may be worked on in this step."""
        paused = [request for request in prefills if request.num_pieces]
        if paused:
            assert len(paused) == 1, "one sparse chunk is paused at a time"
            return paused[0]
        wanting = [request for request in prefills if request.sparse]
        if len(wanting) < 2 or wanting[0].request_id != self._last_owner:
            return wanting[0] if wanting else None
        return min(wanting[1:], key=self._rest_s)

    def _rest_s(self, request: Request) -> float:
        return prefill_s(request, request.scheduled_len, request.prompt_len, self._config,
                         self._latency.costs)


class _PlanBuilder:
    """Adds up slices and their predicted time until the plan is complete."""

    def __init__(
        self, config: PlannerConfig, latency: LatencyModel, decodes: Sequence[Request],
        ends: Mapping[str, Sequence[int]],
    ) -> None:
        self._config, self._costs, self._ends = config, latency.costs, ends
        self._latency = latency
        self._known_reach = FAR * latency.dense_reach
        self._decodes = decodes
        self._prefills: list[PlannedSlice] = []
        self._dense: Terms = (0.0, 0.0, 0.0)
        self._chunk = Work()
        """What the step has of a sparse chunk."""
        context_len = float(sum(request.scheduled_len + 1 for request in decodes))
        self._decode: Terms = (1.0, float(len(decodes)), context_len) if decodes else (0.0,) * 3
        self._num_others = 0
        self.has_chunk = False
        """A sparse chunk is paused or begins: beside it the workspace has room for half a chunk."""

    @property
    def expected_s(self) -> float:
        """Predicted time of the step as it is so far."""
        return self._work.seconds(self._costs)

    @property
    def _work(self) -> Work:
        return replace(self._chunk, dense=self._dense, decode=self._decode)

    def holds(self, request: Request) -> bool:
        """Tell whether some of this prompt is in the step."""
        return any(item.request is request for item in self._prefills)

    def take(
        self, request: Request, room_s: float, *, is_head: bool = False,
        must_progress: bool = False,
    ) -> None:
        """Add as much of a prompt's chunk as fits; at least a unit if it must progress."""
        start, config = request.scheduled_len, self._config
        stop = chunk_stop(start, request.prompt_len, config.ladder, tail_of(request, config) or 0)
        if request.request_id in self._ends:
            ends = self._ends[request.request_id]
            stop = min(stop, ends[bisect_right(ends, start)])
        if request.sparse:
            item = self._pieces(request, stop, room_s, must_progress)
        else:
            item = self._tokens(request, stop, room_s, is_head, must_progress)
        if item is not None:
            self._prefills.insert(0 if is_head else len(self._prefills), item)

    def finish(self) -> StepPlan | None:
        """Make the plan; None if nothing was taken."""
        self._prefills.sort(key=lambda item: item.pieces is None)
        slices = [*self._prefills, *(PlannedSlice(request=r, query_len=1) for r in self._decodes)]
        if not slices:
            return None
        return StepPlan(slices=tuple(slices), work=self._work, expected_s=self.expected_s)

    def _pieces(
        self, request: Request, stop: int, room_s: float, must_progress: bool,
    ) -> PlannedSlice | None:
        config, start, first = self._config, request.scheduled_len, request.num_pieces
        chunk, query_len = sparse_terms(start, stop - start), stop - start
        pieces = chunk_pieces(start, stop, num_layers=config.num_layers, rows=config.piece_rows,
                              is_scored=scored_tokens(request, start, stop) is not None)
        fixed_s = self._costs.of_chunk(query_len)[0]
        room_s = max(room_s, FLOOR * fixed_s) if must_progress else room_s
        if config.num_stages > 1:
            may_begin = must_progress or self._costs.sparse_s(start, query_len) - fixed_s <= room_s
            return self._slice(request, query_len, Pieces(0, len(pieces), len(pieces)), chunk
                               ) if may_begin else None
        # Until each sort of piece was measured, a step has one: the prior may be far off.
        has_budget = config.step_budget_s is not None
        is_known = not has_budget or self._latency.knows_chunks(query_len)
        terms: SparseTerms = (0.0, 0.0, 0.0, 0.0)
        last = first
        while last < len(pieces) and (is_known or last == first):
            more = add_terms(terms, piece_terms(chunk, pieces[last]))
            is_least = last == first and must_progress
            if not is_least and (chunk_work(query_len, more).seconds(self._costs) > room_s
                                 or has_budget and not self._latency.is_near(query_len, more)):
                break
            terms, last = more, last + 1
        if last == first:
            return None
        return self._slice(request, query_len, Pieces(first, last, len(pieces)), terms)

    def _slice(
        self, request: Request, query_len: int, pieces: Pieces, terms: SparseTerms,
    ) -> PlannedSlice:
        """Take pieces of a sparse chunk into the step."""
        self._chunk = chunk_work(query_len, terms)
        return PlannedSlice(request=request, query_len=query_len, pieces=pieces)

    def _tokens(
        self, request: Request, stop: int, room_s: float, is_head: bool, must_progress: bool,
    ) -> PlannedSlice | None:
        config, start = self._config, request.scheduled_len
        room = config.prefill_chunk_len
        if self.has_chunk or not is_head:
            room = side_room(config.prefill_chunk_len) - (0 if is_head else self._num_others)
            room -= self._num_others if is_head and self.has_chunk else 0
        if 2 * start > self._known_reach:
            room_s /= 2  # costs this far in are a guess
        if must_progress:
            room_s = max(room_s, FLOOR * self._costs.dense[0])
        query_len = self._longest(request, stop, room, room_s)
        if query_len == 0 and must_progress:
            unit = (start // config.unit_len + 1) * config.unit_len - start
            query_len = min(stop - start, unit)
        if query_len == 0:
            return None
        if not is_head:
            self._num_others += query_len
        self._dense = add_terms(self._dense, dense_terms(start, query_len))
        return PlannedSlice(request=request, query_len=query_len)

    def _longest(self, request: Request, stop: int, room: int, room_s: float) -> int:
        """Count the tokens up to the chunk's end that fit rows and time; where not all do, those up
        to the last unit's end that do."""
        start, size = request.scheduled_len, self._config.unit_len

        def fits(end: int) -> bool:
            return end - start <= room and self._costs.dense_s(start, end - start) <= room_s

        if fits(stop):
            return stop - start
        low, high = start // size, -(-stop // size)  # low fits (nothing), high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * size) else (low, middle)
        return max(0, low * size - start)


def prefill_s(
    request: Request, start: int, stop: int, config: PlannerConfig, costs: Costs,
) -> float:
    """Predict the time for tokens ``start`` to ``stop - 1`` of a prompt, seconds."""
    return costs.prefill_s(start, stop, tail=tail_of(request, config), ladder=config.ladder)


def scored_tokens(request: Request, start: int, stop: int) -> ScoredTokens | None:
    """Those whose log-probabilities tokens ``start`` to ``stop - 1`` of a request give; None: none
    are wanted."""
    params = request.params
    first = max(start + 1, params.prompt_logprobs_start)
    end = min(stop + 1, request.prompt_len)
    if params.prompt_logprobs is None or first >= end:
        return None
    return ScoredTokens(
        first=first, token_ids=request.prompt_ids[first:end], num_top=params.prompt_logprobs)


def tail_of(request: Request, config: PlannerConfig) -> int | None:
    """Return where a sparse prompt's tail starts; None for dense prompts."""
    if not request.sparse:
        return None
    return tail_start(request.prompt_len, config.tail_len, config.block_size)
