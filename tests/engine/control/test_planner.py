"""What steps hold: the bounds that the planner states, on a simulated machine with noisy times."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from longspan.engine.control.chunking import chunk_pieces
from longspan.engine.control.latency import (
    Costs,
    Forecast,
    LatencyModel,
    SparseTerms,
    Work,
    piece_terms,
    sparse_terms,
)
from longspan.engine.control.planner import SLACK, Planner, prefill_s
from longspan.engine.control.scheduler import Scheduler, SchedulerConfig
from longspan.engine.request import Request, SamplingParams
from longspan.engine.step import Pieces, ScheduledBatch, ScheduledSlice, StepResult

BUDGET_S = 1.0
COSTS = Costs(dense=(8e-3, 2.4e-4, 4.5e-8), sparse=(8e-3, 5e-4, 4e-10, 3e-6),
              decode=(9e-3, 1e-3, 2e-6))
"""A small model on two CPU cores: 9 s for a sparse chunk, 31 pieces."""
CONFIG = SchedulerConfig(
    num_blocks=40_000, block_size=128, max_model_len=1 << 20, prefill_chunk_len=16_384,
    max_num_requests=64, tail_len=1024, num_layers=6, piece_rows=4096, unit_len=16,
    step_budget_s=BUDGET_S, prior=COSTS)

H200 = Costs(dense=(2e-3, 2.5e-5, 6e-10), sparse=(2e-3, 2.2e-5, 2e-12, 1.1e-7),
             decode=(5e-3, 1e-3, 1e-9))
"""A 7B model: 3 s for a sparse chunk of 126,976 tokens."""
H200_CONFIG = replace(
    CONFIG, prefill_chunk_len=126_976, num_layers=28, piece_rows=63_488, unit_len=128,
    step_budget_s=0.1, prior=Costs(dense=(2e-3, 1.5e-4, 2e-9), decode=H200.decode,
                                   sparse=(2e-3, 1.5e-4, 3e-11, 2.5e-7)))


@dataclass
class Machine:
    """Runs a scheduler in simulated time."""

    config: SchedulerConfig = CONFIG
    costs: Costs = COSTS
    launch_s: float = 0.0
    """The host's time for each piece of a sparse chunk."""
    noise: float = 0.1
    now_s: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    steps: list[ScheduledBatch] = field(default_factory=list)
    lengths_s: list[float] = field(default_factory=list)
    first_s: dict[str, float] = field(default_factory=dict)
    """When each request's first token came."""
    arrived_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)

    def add(self, request_id: str, prompt_len: int, max_tokens: int = 1) -> Request:
        """A prompt like no other."""
        prompt = array("i", [self.rng.randrange(1000), *range(prompt_len - 1)])
        request = Request(
            request_id=request_id, prompt_ids=prompt, sparse=prompt_len > 32_768,
            params=SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        self.scheduler.add(request)
        self.arrived_s[request_id] = self.now_s
        return request

    def step(self) -> bool:
        """One step; False when there is nothing to do."""
        batch = self.scheduler.schedule()
        if batch is None:
            return False
        self.steps.append(batch)
        elapsed_s = self._time(batch) * self.rng.uniform(1 - self.noise, 1 + self.noise)
        self.now_s += elapsed_s
        self.lengths_s.append(elapsed_s)
        sampled = [item.request_id for item in batch.slices if item.sampling is not None]
        for request_id in sampled:
            self.first_s.setdefault(request_id, self.now_s)
        self.scheduler.apply(StepResult(
            step_id=batch.step_id, token_ids=(1,) * len(sampled), elapsed_s=elapsed_s))
        return True

    def run(self) -> None:
        """To the end."""
        while self.step():
            pass

    def ttft_s(self, request_id: str) -> float:
        """Time to first token of a finished request."""
        return self.first_s[request_id] - self.arrived_s[request_id]

    def _time(self, batch: ScheduledBatch) -> float:
        total_s, decodes = 0.0, [i for i in batch.slices if i.cached_len >= i.prompt_len]
        for item in batch.slices:
            if item.pieces is not None:
                total_s += self._pieces_s(item, item.pieces)
            elif item.cached_len < item.prompt_len:
                total_s += self.costs.dense_s(item.cached_len, item.query_len)
        if decodes:
            context_len = sum(item.context_len for item in decodes)
            total_s += self.costs.decode_s(len(decodes), context_len)
        return total_s

    def _pieces_s(self, item: ScheduledSlice, pieces: Pieces) -> float:
        chunk = sparse_terms(item.cached_len, item.query_len)
        found = chunk_pieces(item.cached_len, item.context_len, num_layers=self.config.num_layers,
                             rows=self.config.piece_rows)
        costs, num_pieces = self.costs.of_chunk(item.query_len), pieces.stop - pieces.first
        device_s = 0.0
        for piece in found[pieces.first:pieces.stop]:
            terms = piece_terms(chunk, piece)
            device_s += sum(a * b for a, b in zip(costs[1:], terms[1:], strict=True))
        return costs[0] + max(device_s, num_pieces * self.launch_s)


def test_a_short_prompt_waits_two_budgets_at_most_beside_a_long_one() -> None:
    machine = Machine()
    machine.add("long", 131_072)
    for index in range(40):
        for _ in range(3):
            machine.step()
        machine.add(f"short{index}", 200)
    machine.run()
    waits_s = [machine.ttft_s(f"short{index}") for index in range(40)]
    assert max(waits_s) <= 2 * BUDGET_S
    assert max(machine.lengths_s) <= BUDGET_S


def test_running_decodes_never_pause_longer_than_a_budget() -> None:
    machine = Machine()
    machine.add("stream", 300, max_tokens=200)
    machine.step()
    machine.add("long", 131_072)
    while "long" not in machine.first_s:
        machine.step()
        assert any(item.request_id == "stream" for item in machine.steps[-1].slices)
    assert max(machine.lengths_s) <= BUDGET_S


@pytest.mark.parametrize("seed", range(4))
def test_a_noisy_machine_keeps_its_budget_after_many_short_prompts(seed: int) -> None:
    """What was learned from the first long prompt is forgotten when the second one comes."""
    machine = Machine(noise=0.25, rng=random.Random(seed))
    for name in ("first", "second"):
        for index in range(150):
            machine.add(f"{name}{index}", machine.rng.randrange(100, 108))
            machine.run()
        machine.add(name, 131_072)
        machine.run()
    assert max(machine.lengths_s) <= 1.5 * BUDGET_S


def test_the_budget_holds_before_anything_was_measured() -> None:
    """The default prior is pessimistic enough for a machine ten times slower or faster."""
    for factor in (0.1, 1.0):
        costs = Costs(dense=_times(COSTS.dense, factor), sparse=_times(COSTS.sparse, factor),
                      decode=_times(COSTS.decode, factor))
        machine = Machine(costs=costs, config=CONFIG)
        machine.add("long", 131_072)
        machine.add("short", 100)
        machine.run()
        assert max(machine.lengths_s) <= BUDGET_S


def test_an_unknown_kind_begins_with_a_single_piece() -> None:
    """The prior may think that a whole chunk fits."""
    config = SchedulerConfig(**{
        **{name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__},
        "prior": Costs(dense=COSTS.dense, sparse=(0.0, 1e-9, 0.0, 0.0), decode=COSTS.decode)})
    machine = Machine(config=config)
    machine.add("long", 131_072)
    machine.run()
    pieces = [item.pieces for batch in machine.steps for item in batch.slices if item.pieces]
    assert pieces[0].stop == 1 and max(machine.lengths_s) <= BUDGET_S


def test_a_prompts_tail_keeps_the_budget_behind_a_million_tokens() -> None:
    """An H200's times: the host needs longer to launch a tail's pieces than the device to compute
    them, which no long chunk shows, and hundreds of long ones come between two tails."""
    machine = Machine(config=H200_CONFIG, costs=H200, launch_s=5e-3)
    machine.add("stream", 300, max_tokens=3_000)
    machine.step()
    for name in ("first", "second"):
        machine.add(name, 1_000_000)
        while name not in machine.first_s:
            machine.step()
    tails = [elapsed_s for batch, elapsed_s in zip(machine.steps, machine.lengths_s, strict=True)
             if any(item.pieces and item.query_len < 2_048 for item in batch.slices)]
    assert len(tails) > 10 and max(machine.lengths_s) <= 0.1


@pytest.mark.parametrize("num_decodes", [1, 2, 5])
@pytest.mark.parametrize("slow_s", [0.3, 3.0])
def test_a_slow_first_decode_does_not_make_prefills_look_fast(
    slow_s: float, num_decodes: int,
) -> None:
    """Its kernels were compiled in it, say. What the first pieces take beside decodes that are
    thought to be as slow is nearly all theirs."""
    machine = Machine(config=H200_CONFIG, costs=H200, launch_s=5e-3)
    machine.add("first", 2_048)
    machine.run()
    machine.add("stream", 300, max_tokens=4_000)
    machine.step()
    machine.costs = replace(H200, decode=(slow_s, 0.0, 0.0))
    machine.step()
    machine.costs = H200
    for _ in range(num_decodes - 1):
        machine.step()
    before = len(machine.steps)
    machine.add("long", 1_000_000)
    while "long" not in machine.first_s:
        machine.step()
    assert max(machine.lengths_s[before:]) <= 0.1


@pytest.mark.parametrize(("num_decodes", "lengths"), [
    (10, [40_000] * 6), (45, [40_000] * 6), (20, [65_536, 131_072] * 2)])
def test_many_decodes_do_not_keep_a_prompt_from_its_time(
    num_decodes: int, lengths: list[int],
) -> None:
    """Steps in which decodes take longest teach nothing of sparse chunks, and are no reason to
    compute less of them; nor is it one that such steps are now and then shorter than predicted."""
    found = []
    for is_known in (False, True):
        machine = Machine(config=H200_CONFIG, costs=H200)
        if is_known:
            machine.scheduler.latency = Known(H200)
            machine.scheduler._planner = Planner(H200_CONFIG, machine.scheduler.latency)
        for index in range(num_decodes):
            machine.add(f"stream{index}", 300, max_tokens=60_000)
        for _ in range(2 * num_decodes):
            machine.step()
        for index, length in enumerate(lengths):
            machine.add(f"{index}", length)
            while f"{index}" not in machine.first_s:
                machine.step()
        found.append([machine.ttft_s(str(index)) for index in range(1, len(lengths))])
    assert all(own <= 1.1 * best for own, best in zip(*found, strict=True)), found


class Known(LatencyModel):
    """A model that knows the costs, and learns nothing."""

    def observe(self, work: Work, seconds: float) -> None:
        """Learn nothing."""
        self.num_observations += 1

    def knows_chunks(self, query_len: int) -> bool:
        """Know all of them."""
        return True

    def is_near(self, query_len: int, terms: SparseTerms) -> bool:
        """Trust what it knows."""
        return True


def test_a_step_has_twice_the_work_of_a_measured_one_at_the_most() -> None:
    """Costs that are far too low, whatever the reason, cannot fill a step with a whole chunk."""
    machine = Machine(config=H200_CONFIG, costs=H200)
    machine.add("long", 400_000)
    for number in range(20):
        machine.scheduler.latency._costs = replace(H200, sparse=(0.0, 1e-12, 0.0, 0.0))
        machine.step()
        pieces = machine.steps[-1].slices[0].pieces
        assert pieces is not None and pieces.stop - pieces.first <= max(1, 2 ** (number - 1))


def test_short_chunks_behind_a_long_one_keep_the_budget() -> None:
    """The host needs longer to launch 3,000 tokens behind 126,976 than the device to compute."""
    machine = Machine(config=H200_CONFIG, costs=H200, launch_s=2e-3)
    machine.add("stream", 300, max_tokens=60_000)
    machine.step()
    for index, length in enumerate((131_000, 131_500, 150_000)):
        machine.add(str(index), length)
        while str(index) not in machine.first_s:
            machine.step()
    assert max(machine.lengths_s) <= 0.1


def test_a_stream_of_shorts_cannot_starve_the_long_prompt() -> None:
    """It gets half of the time at least, so it takes twice its time alone, and a little for the
    fixed costs of more steps."""
    alone, busy = Machine(noise=0.0), Machine(noise=0.0)
    alone.add("long", 131_072)
    alone.run()
    busy.add("long", 131_072)
    count = 0
    while "long" not in busy.first_s:
        while busy.scheduler.num_requests < 12:
            busy.add(f"short{count}", 1500)
            count += 1
        busy.step()
    assert count > 100
    assert 1.5 < busy.ttft_s("long") / alone.ttft_s("long") < 2.2


def test_shorter_prompts_go_first_and_each_becomes_the_head_in_time() -> None:
    machine = Machine()
    machine.add("head", 30_000)
    lengths = {"c": 20_000, "a": 400, "b": 4_000}
    for name, length in lengths.items():
        machine.add(name, length)
    machine.run()
    order = sorted(machine.first_s, key=machine.first_s.__getitem__)
    assert order.index("a") < order.index("b") < order.index("c")
    assert set(order) == {"head", *lengths}


def test_sparse_prompts_take_turns_chunk_by_chunk() -> None:
    machine = Machine()
    for name in ("old", "young", "younger"):
        machine.add(name, 66_000)
    machine.run()
    begun = [item.request_id for batch in machine.steps for item in batch.slices
             if item.pieces is not None and item.pieces.first == 0]
    assert begun[:6] == ["old", "young", "old", "young", "old", "young"]
    assert len(begun) == 3 * 5  # four chunks and the tail


def test_without_a_budget_chunks_are_computed_whole() -> None:
    config = SchedulerConfig(**{
        name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__
        if name != "step_budget_s"})
    machine = Machine(config=config)
    machine.add("long", 50_000)
    machine.run()
    assert [batch.slices[0].query_len for batch in machine.steps] == [
        16_384, 16_384, 48_640 - 2 * 16_384, 50_000 - 48_640]


def test_steps_in_flight_share_the_budget() -> None:
    machine = Machine()
    machine.add("first", 40_000)
    machine.run()  # until its pieces are known, a step has one of them
    machine.add("long", 131_072)
    first = machine.scheduler.schedule()
    assert first is not None and first.expected_s <= (1 - SLACK) * BUDGET_S
    second = machine.scheduler.schedule(first.expected_s)
    expected_s = first.expected_s + (second.expected_s if second else 0.0)
    assert expected_s <= (1 - SLACK) * BUDGET_S
    assert machine.scheduler.schedule(expected_s) is None


def test_a_unit_is_computed_even_where_it_exceeds_the_budget() -> None:
    config = SchedulerConfig(**{
        **{name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__},
        "step_budget_s": 1e-3})
    machine = Machine(config=config)
    machine.add("long", 40_000)
    machine.run()
    assert "long" in machine.first_s
    pieces = [item.pieces for batch in machine.steps for item in batch.slices if item.pieces]
    assert all(piece.stop == piece.first + 1 for piece in pieces)


@pytest.mark.parametrize("fixed_s", [0.2, 0.7, 1.0, 1.5, 3.0])
def test_a_busy_machine_does_not_compute_in_crumbs(fixed_s: float) -> None:
    """What every step costs is most of the budget, or more. Steps must not be cut to units for it,
    which would be a thousand of them, nor take much more than twice as long as an empty one."""
    costs = Costs(dense=(fixed_s, *COSTS.dense[1:]), sparse=(fixed_s, *COSTS.sparse[1:]),
                  decode=(fixed_s, *COSTS.decode[1:]))
    machine = Machine(costs=costs)
    for length in (512, 1024):
        machine.add(f"first {length}", length, max_tokens=8)
        machine.run()
    begin_s, alone_s = machine.now_s, costs.dense_s(0, 16_000) - fixed_s
    machine.add("dense", 16_000)
    machine.run()
    assert machine.now_s - begin_s < 8 * alone_s
    assert max(machine.lengths_s) < max(BUDGET_S, 2 * fixed_s) * 1.3


@pytest.mark.parametrize("second_len", [131_072, 131_072 + 200])
def test_two_requests_on_one_document_compute_it_once(second_len: int) -> None:
    """The second arrives while the first is being prefilled, and waits for its blocks."""
    machine = Machine()
    first = machine.add("first", 131_072)
    for _ in range(5):
        machine.step()
    prompt = first.prompt_ids + array("i", range(second_len - 131_072))
    machine.add("second", second_len)
    second = machine.scheduler._waiting[-1]
    second.prompt_ids = prompt
    machine.add("other", 300)
    machine.run()
    assert second.num_cached_tokens >= 112 * 1024
    assert machine.ttft_s("other") <= 2 * BUDGET_S
    assert machine.first_s["second"] - machine.first_s["first"] < 12.0


def test_waiters_go_on_alone_when_the_owner_is_aborted() -> None:
    machine = Machine()
    first = machine.add("first", 131_072)
    for _ in range(40):
        machine.step()
    machine.add("second", 131_072)
    second = machine.scheduler._waiting[-1]
    second.prompt_ids = first.prompt_ids
    machine.step()
    assert machine.scheduler.load.num_waiting == 1
    machine.scheduler.abort("first")
    machine.run()
    assert "second" in machine.first_s and 0 < second.num_cached_tokens < 131_072
    machine.scheduler.check()


@pytest.mark.parametrize(("num_shared", "num_waiting"), [(256, 0), (8192, 1)])
def test_a_short_prefix_is_computed_and_not_waited_for(num_shared: int, num_waiting: int) -> None:
    machine = Machine()
    owner = machine.add("owner", 30_000)
    machine.scheduler.schedule()
    machine.add("other", num_shared + 500)
    machine.scheduler._waiting[-1].prompt_ids = (
        owner.prompt_ids[:num_shared] + array("i", [7] * 500))
    machine.scheduler.schedule()
    assert machine.scheduler.load.num_waiting == num_waiting


def _times(terms: tuple[float, ...], factor: float) -> Any:
    return tuple(factor * value for value in terms)


@pytest.mark.parametrize("seed", range(60))
def test_forecasts_and_plans_agree(seed: int) -> None:
    """What a server foretells is the sum of the steps that the planner makes, and so is the rest
    by which it ranks prompts: wherever the tail starts, and whatever is cached."""
    rng = random.Random(seed)
    config = replace(CONFIG, step_budget_s=None, sparse_above=20_000, prefill_chunk_len=4096,
                     tail_len=rng.choice([0, 1000, 4096, 5000]))
    length = rng.choice([rng.randrange(1, 20_001), rng.randrange(20_001, 140_000)])
    cached = rng.randrange(length // 4096 + 1) * 4096 % length
    request = Request(request_id="a", prompt_ids=array("i", bytes(4 * length)),
                      params=SamplingParams(max_tokens=1), sparse=length > 20_000)
    forecast = Forecast(costs=COSTS, block_size=128, prefill_chunk_len=4096, sparse_above=20_000,
                        tail_len=config.tail_len)
    expected_s = forecast.prefill_s(cached, length)
    assert prefill_s(request, cached, length, config, COSTS) == expected_s
    planner, request.scheduled_len, total_s = Planner(config, LatencyModel(COSTS)), cached, 0.0
    while request.is_prefill:
        plan = planner.plan([request], 0.0)
        assert plan is not None
        total_s += plan.expected_s
        request.scheduled_len += plan.slices[0].query_len
    assert total_s == pytest.approx(expected_s), (seed, length, cached)
