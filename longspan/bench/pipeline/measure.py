"""`longspan bench pipeline`: time to the first token of one prompt on several GPUs, or processes on
CPUs, measured; beside it what the time of one of them lets expect.

Random weights, random tokens, the real scheduler and ranks. Every plan of an arrangement runs on
one engine, each after a prompt that warms up, whose steps the latency model learns from.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

from longspan.bench.engine.decode import IN_FLIGHT, time_steps
from longspan.bench.engine.engine import (
    EngineSizes,
    ShapeEngine,
    decode_step,
    open_engine,
    random_ids,
)
from longspan.bench.pipeline.costs import Ranks
from longspan.bench.pipeline.rates import read_rates
from longspan.bench.pipeline.show import DECODE, MEASURED, USERS, show
from longspan.bench.pipeline.simulate import Simulator
from longspan.bench.session import BenchSession, CheckFailed
from longspan.bench.shapes import Shape
from longspan.bench.timing import rounded, synchronize
from longspan.config import EngineConfig
from longspan.engine.control.latency import Costs
from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler, SchedulerConfig
from longspan.engine.control.stage_plan import flow
from longspan.engine.control.transport import LocalTransport, PendingStep
from longspan.engine.request import Request, SamplingParams
from longspan.engine.setup.compile_ahead import compile_steps
from longspan.engine.setup.lead_runner import LeadRunner
from longspan.engine.setup.stage_layers import stage_layers
from longspan.engine.step import ScheduledBatch, StepResult
from longspan.errors import LongspanError

MOST_SPANS = 600
"""Timelines of more steps, on all ranks together, are left out of the rows."""
LAST_LAYER = 0.02
"""Time of the last layer in a prefill against another's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureOptions:
    """What was asked for on the command line."""

    lengths: tuple[int, ...]
    """Prompt lengths, tokens."""
    attention: tuple[str, ...]
    arrangements: tuple[Ranks, ...]
    """Ways in which ranks work together; one alone comes first."""
    chunk_lens: tuple[int, ...]
    """Fixed lengths of prefill chunks, tokens."""
    layers: int | None = None
    """Only the first layers are computed; None: all."""
    memory_gib: float | None = None
    rates_of: str = ""
    """Device of the rows that a simulation starts from; empty: none is shown beside."""
    decode_steps: int = 0
    """Steps of decoding that are timed behind a context of each length; 0: none."""
    users: int = 1
    """So many prompts of each length are handed in together besides, where they are several."""


def parse_arrangement(text: str) -> Ranks:
    """Read ``1``, ``cp2`` or ``cp2xtp2``. Raises `LongspanError` for anything else."""
    if text == "1":
        return Ranks()
    found = dict[str, int]()
    for part in text.split("x"):
        name, count = part[:2], part[2:]
        if name not in ("cp", "pp", "tp") or not count.isdecimal() or int(count) < 2 or (
                name in found):
            raise LongspanError(f"--ranks: {text!r} is not 1, cp2, pp4, tp2 or some joined by x, "
                                "as in cp2xtp2")
        found[name] = int(count)
    return Ranks(**found)


@dataclass(slots=True)
class Seen:
    """Steps of one prompt."""

    cuts: list[tuple[int, int]] = field(default_factory=list)
    """First position and the one behind the last of each step's rows."""
    expected_s: list[float] = field(default_factory=list)
    elapsed_s: list[float] = field(default_factory=list)
    """By the slowest rank."""
    launch_s: list[float] = field(default_factory=list)
    """What the host needed to launch each; of several ranks only to tell them."""

    @property
    def error(self) -> float:
        """Median of how far predictions of the steps' times were off, a share of the time."""
        return median(abs(expected - elapsed) / elapsed for expected, elapsed in zip(
            self.expected_s, self.elapsed_s, strict=True))


class _Watched:
    """Launches steps on a runner, and notes them."""

    def __init__(self, engine: ShapeEngine) -> None:
        self._runner, self.seen = engine.runner, Seen()

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        """Hand the step over."""
        begun_s = time.perf_counter()
        launched = self._runner.launch(batch)
        self.seen.launch_s.append(time.perf_counter() - begun_s)
        return _WatchedStep(launched, batch, self.seen)


class _WatchedStep:
    def __init__(self, step: PendingStep, batch: ScheduledBatch, seen: Seen) -> None:
        self._step, self._batch, self._seen = step, batch, seen

    def wait_for(self, timeout_s: float) -> bool:
        return self._step.wait_for(timeout_s)

    def wait(self) -> StepResult:
        result = self._step.wait()
        if len(self._batch.slices) == 1:  # of several prompts nothing is told step by step
            (item,) = self._batch.slices
            self._seen.cuts.append((item.cached_len, item.context_len))
            self._seen.expected_s.append(self._batch.expected_s)
            self._seen.elapsed_s.append(result.elapsed_s)
        return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill:
    """One prompt, measured."""

    ttft_s: float
    seen: Seen
    spans: list[list[tuple[float, float]]]
    """[rank][step]: begin and end, seconds after the prompt was handed in."""

    @property
    def idle(self) -> list[float]:
        """Share of the time in which each rank computed no step."""
        return [max(0.0, 1 - sum(stop - start for start, stop in spans) / self.ttft_s)
                for spans in self.spans]


class Prompts:
    """Prefills prompts on one engine, cut in one way."""

    def __init__(self, engine: ShapeEngine, config: SchedulerConfig, device: str) -> None:
        self._engine, self._device = engine, device
        self._scheduler = Scheduler(config)
        self._watched = _Watched(engine)
        transport = LocalTransport(self._watched, engine.runner.transport().max_in_flight)
        self._loop, self._count = Loop(self._scheduler, transport), 0

    @property
    def costs(self) -> Costs:
        """What the latency model has learned."""
        return self._scheduler.latency.costs

    def prefill(self, length: int, *, sparse: bool) -> Prefill:
        """Measure one prompt of tokens that none had before. Raises `CheckFailed` when the engine
        gives it up."""
        self._watched.seen = Seen()
        runner = self._engine.runner
        runner.trace()
        begun_s, (ttft_s,) = self.first_tokens(length, 1, sparse=sparse)
        every = runner.traced_ranks() if isinstance(runner, LeadRunner) else [runner.traced()]
        return Prefill(ttft_s=ttft_s, seen=self._watched.seen, spans=[
            [(start - begun_s, stop - begun_s) for start, stop in spans] for spans in every])

    def first_tokens(
        self, length: int, count: int, *, sparse: bool,
    ) -> tuple[float, list[float]]:
        """Hand in so many such prompts together. Returns when, by `time.perf_counter`, and the time
        to the first token of each, shortest first, seconds. Raises as `prefill`."""
        requests = list[Request]()
        for _ in range(count):
            self._count += 1
            requests.append(Request(
                request_id=str(self._count), sparse=sparse,
                prompt_ids=random_ids(length, self._engine.plan.model.vocab_size, self._count),
                params=SamplingParams(max_tokens=1, ignore_eos=True)))
        synchronize(self._device)
        begun_s, found = time.perf_counter(), list[float]()
        for request in requests:
            self._loop.add(request)
        while len(found) < count:
            for update in self._loop.turn().updates:
                if update.failure:
                    raise CheckFailed(f"{update.failure}; not timed")
                if update.token_id is not None:
                    found.append(time.perf_counter() - begun_s)
        while not self._loop.is_idle:
            self._loop.turn()
        return begun_s, found


def measure(session: BenchSession, shape: Shape, options: MeasureOptions) -> int:
    """Measure, write rows, print the table. Returns the exit status."""
    cut = shape.cut(options.layers)
    known = dict[tuple[str, int], _Alone]()
    block, longest = EngineConfig(model="").block_size, max(options.lengths) + 1
    for ranks in options.arrangements:
        sizes = EngineSizes(
            max_model_len=longest, num_tokens=options.users * -(-longest // block) * block,
            max_num_requests=options.users, chunk_len=max(options.chunk_lens),
            memory_gib=options.memory_gib, ranks=ranks.cp, stages=ranks.pp, heads=ranks.tp)
        try:
            with open_engine(cut, session.device, sizes) as engine:
                engine.runner.compile_ahead(compile_steps(
                    engine.plan.scheduler_config(), shares_rows=ranks.cp > 1))
                for attention in options.attention:
                    for length in options.lengths:
                        _Series(session, cut, options, engine, ranks, known).run(attention, length)
                        _together(session, cut, options, engine, ranks, attention, length)
                for length in options.lengths if options.decode_steps else ():
                    session.attempt(
                        {**_key(shape.name, "", length, ranks, DECODE), "source": DECODE},
                        partial(_decode, session, cut, options, engine, length))
        except LongspanError as error:
            session.attempt(_key(shape.name, "", 0, ranks, ""), _raiser(error))
    show(session.rows)
    return session.finish()


def _together(
    session: BenchSession, shape: Shape, options: MeasureOptions, engine: ShapeEngine,
    ranks: Ranks, attention: str, length: int,
) -> None:
    """Measure several prompts that are handed in together, cut as the engine cuts them."""
    if options.users == 1:
        return

    def work() -> Mapping[str, Any]:
        prompts = Prompts(engine, engine.plan.scheduler_config(), session.device)
        sparse = attention == "sparse"
        prompts.prefill(min(length, 2 * max(options.chunk_lens)), sparse=sparse)
        _, found = prompts.first_tokens(length, options.users, sparse=sparse)
        return {**_layers(shape), "users": options.users,
                "divides_kv": bool(engine.plan.config.divides_kv),
                "ttft_s": rounded(found[-1], 4),  # of the last one
                "ttft_each_s": [rounded(each, 4) for each in found],
                "tokens_per_s": rounded(options.users * length / found[-1], 4)}

    key = _key(shape.name, attention, length, ranks, f"{options.users} users")
    session.attempt({**key, "source": USERS}, work)


def _decode(
    session: BenchSession, shape: Shape, options: MeasureOptions, engine: ShapeEngine, length: int,
) -> Mapping[str, Any]:
    """Time steps of one request behind a context, one after the other and two under way."""
    step = decode_step(engine, length, 1)
    alone, ahead = (time_steps(engine, step, session.device, options.decode_steps, in_flight=count)
                    for count in (1, IN_FLIGHT))
    return {**_layers(shape), "divides_kv": bool(engine.plan.config.divides_kv),
            "step_ms": rounded(median(ahead), 4), "low_ms": rounded(min(ahead), 4),
            "high_ms": rounded(max(ahead), 4), "n": len(ahead),
            "sync_step_ms": rounded(median(alone), 4)}


@dataclass(frozen=True, slots=True)
class _Alone:
    """What one rank needed."""

    fixed_s: Mapping[str, float]
    """Time to the first token by plan."""
    costs: Costs


class _Series:
    """All plans of one arrangement."""

    def __init__(
        self, session: BenchSession, shape: Shape, options: MeasureOptions, engine: ShapeEngine,
        ranks: Ranks, known: dict[tuple[str, int], _Alone],
    ) -> None:
        self._session, self._shape, self._options = session, shape, options
        self._engine, self._ranks, self._known = engine, ranks, known

    def run(self, attention: str, length: int) -> None:
        """Measure one prompt length by all plans; a row for each."""
        rows, ranks, costs = list[dict[str, Any]](), self._ranks, Costs()
        for plan, config in self._plans(attention):
            def work(config: SchedulerConfig = config, plan: str = plan) -> Mapping[str, Any]:
                nonlocal costs
                prompts = Prompts(self._engine, config, self._session.device)
                sparse = attention == "sparse"
                prompts.prefill(min(length, 2 * config.prefill_chunk_len), sparse=sparse)
                found, costs = prompts.prefill(length, sparse=sparse), prompts.costs
                return self._row(attention, length, plan, found)

            key = _key(self._shape.name, attention, length, ranks, plan)
            if not config.fixed_chunks and ranks.pp > 1:  # what the engine may plan depends on it
                key["limit"] = config.prefill_chunk_len
            row = self._session.attempt(key, work)
            if row is not None:
                rows.append(row)
        fixed = [row for row in rows if row["plan"].startswith("fixed ")]
        if ranks == Ranks() and fixed:
            self._known[attention, length] = _Alone(
                {row["plan"]: row["ttft_s"] for row in fixed}, costs)

    def _plans(self, attention: str) -> Iterator[tuple[str, SchedulerConfig]]:
        # chunks as they are asked for: a server's budget would cut them by the time that they take
        config = replace(self._engine.plan.scheduler_config(), step_budget_s=None)
        for length in self._options.chunk_lens:
            yield f"fixed {length}", replace(config, prefill_chunk_len=length, fixed_chunks=True)
        if self._ranks.pp > 1:  # as the engine cuts prompts by itself
            yield "ladder" if attention == "sparse" else "planned", config

    def _row(self, attention: str, length: int, plan: str, found: Prefill) -> dict[str, Any]:
        ranks, seen = self._ranks, found.seen
        lengths = [stop - start for start, stop in seen.cuts]
        alone = self._known.get((attention, length))
        base_s = None if alone is None else alone.fixed_s.get(plan, min(alone.fixed_s.values()))
        row: dict[str, Any] = {
            **_layers(self._shape), "policy": self._shape.plan_label,
            "ttft_s": rounded(found.ttft_s, 4), "num_chunks": len(lengths),
            "longest_chunk": max(lengths), "shortest_chunk": min(lengths[:-1] or lengths),
            "idle": rounded(sum(found.idle) / len(found.idle), 3),
            "idle_by_rank": [rounded(value, 3) for value in found.idle],
            "step_error": rounded(seen.error, 3)}
        if ranks == Ranks():
            base_s = found.ttft_s
            row["launch_s"] = [rounded(each, 3) for each in seen.launch_s[:len(lengths)]]
        if base_s is not None:
            row["speedup"] = rounded(base_s / found.ttft_s, 4)
            row["lost"] = rounded(1 - base_s / (ranks.count * found.ttft_s), 3)
        if alone is not None:
            row["predicted_s"] = rounded(predict(
                self._engine, alone.costs, ranks, seen.cuts, sparse=attention == "sparse"), 4)
        simulated = self._simulated(attention, plan, seen.cuts)
        if simulated is not None:
            row["simulated_s"] = rounded(simulated, 4)
        if sum(map(len, found.spans)) <= MOST_SPANS:
            row["timeline_ms"] = [[[round(1e3 * start, 2), round(1e3 * stop, 2)]
                                   for start, stop in spans] for spans in found.spans]
        return row

    def _simulated(
        self, attention: str, plan: str, cuts: Sequence[tuple[int, int]],
    ) -> float | None:
        """Return what the simulation says of the same cuts, where there are rates to start from."""
        if not self._options.rates_of:
            return None
        rates = read_rates(self._shape, self._session.options.out, self._options.rates_of)
        return Simulator(self._shape, rates, sparse=attention == "sparse").cut(
            self._ranks, plan, cuts).ttft_s


def predict(
    engine: ShapeEngine, costs: Costs, ranks: Ranks, cuts: Sequence[tuple[int, int]], *,
    sparse: bool,
) -> float:
    """Predict the time of these chunks from what one rank's steps have cost, if nothing waits:
    ranks that share a layer share its time, stages have that of their layers."""
    times = [(costs.sparse_s if sparse else costs.dense_s)(start, stop - start)
             for start, stop in cuts]
    layers = engine.plan.model.num_layers
    shares = [1.0]
    if ranks.pp > 1:
        sizes = [sum(LAST_LAYER if idx == layers - 1 else 1.0 for idx in stage)
                 for stage in stage_layers(engine.plan.model, engine.plan.plan, ranks.pp)]
        shares = [size / sum(sizes) for size in sizes]
    sharers = ranks.cp * ranks.tp
    return flow([[time_s * share / sharers for share in shares] for time_s in times],
                max_in_flight=ranks.pp + 1).total_s


def _layers(shape: Shape) -> dict[str, Any]:
    """Say how many layers are computed, and how many the model has."""
    return {"layers": shape.model.num_layers,
            "total_layers": Shape.make(shape.name).model.num_layers}


def _key(shape: str, attention: str, length: int, ranks: Ranks, plan: str) -> dict[str, Any]:
    return {"shape": shape, "num_tokens": length, "attention": attention, "cp": ranks.cp,
            "pp": ranks.pp, "tp": ranks.tp, "plan": plan, "source": MEASURED}


def _raiser(error: Exception) -> Any:
    def work() -> Mapping[str, Any]:
        raise error
    return work
