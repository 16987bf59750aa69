"""Prefills of one prompt on several GPUs, simulated: time to the first token, idle shares,
timeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.bench.pipeline.costs import LayerCosts, Ranks
from longspan.bench.pipeline.rates import ASSUMED, Assumptions, Rates
from longspan.bench.pipeline.steps import Cuts, sparse_cuts
from longspan.bench.shapes import Shape
from longspan.engine.control.ladder import Ladder
from longspan.engine.control.latency import Costs, LatencyModel, Work, dense_terms
from longspan.engine.control.stage_plan import (
    DenseCosts,
    Flow,
    flow,
    plan_dense,
    split_by_time,
)

SWEPT = (1_024, 2_048, 3_072, 4_096, 6_144, 8_192, 12_288, 16_384, 24_576, 32_768, 49_152, 65_536,
         98_304, 131_072)
"""Chunk lengths that are tried for the best fixed one."""
ALIGNED = (7_936, 15_872, 31_744, 63_488, 126_976)
"""Further ones of sparse prompts: none has an end of DCA's chunks inside, where it would be
selected for twice."""
LONGEST = 32_768
"""Longest chunk of a dense plan."""
LADDER = ALIGNED[-1]
"""Longest chunk of a ladder: what the engine chooses for these shapes."""
SHORTEST = 1_024
"""Least length of a planned dense chunk: shorter ones were never measured."""
UNIT = 128
SPLIT_LEN = 524_288
"""Stages are split so that a prompt of this length takes equal times on them."""
BEST = "best fixed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """One prompt on some GPUs."""

    ranks: Ranks
    plan: str
    """How the prompt was cut: ``fixed 8192``, ``best fixed``, ``planned``, ``ladder``."""
    cuts: Cuts
    flow: Flow
    stages: tuple[range, ...]
    """Layers of each stage."""
    waits: float
    """Share of the time that collectives and waiting for the slowest rank take on each stage."""

    @property
    def ttft_s(self) -> float:
        """Time to the first token, seconds; the decode step that gives it is not counted."""
        return self.flow.total_s

    @property
    def idle(self) -> list[float]:
        """Share of the time for which the GPUs of each stage compute nothing."""
        return [self.flow.idle(stage) + self.waits * (1 - self.flow.idle(stage))
                for stage in range(self.ranks.pp)]


class Simulator:
    """Simulates prefills of one shape and kind of attention."""

    def __init__(
        self, shape: Shape, rates: Rates, *, sparse: bool, assumed: Assumptions = ASSUMED,
    ) -> None:
        self.shape, self._rates, self.sparse, self._assumed = shape, rates, sparse, assumed
        self._costs: dict[tuple[Ranks, Assumptions], LayerCosts] = {}

    def run(self, ranks: Ranks, plan: str, num_tokens: int) -> Simulated:
        """Simulate a prompt, cut by a plan's name (see `Simulated.plan`)."""
        if plan == BEST:
            swept = (*SWEPT, *ALIGNED) if self.sparse else SWEPT
            trials = (self.fixed(ranks, num_tokens, length) for length in swept)
            return min(trials, key=lambda trial: trial.ttft_s)
        if plan.startswith("fixed "):
            return self.fixed(ranks, num_tokens, int(plan.removeprefix("fixed ")))
        if plan == "ladder":
            ladder = Ladder(longest=LADDER, num_stages=ranks.pp, block_size=UNIT)
            return self.cut(ranks, plan, self._sparse_cuts(num_tokens, ladder))
        assert plan == "planned" and not self.sparse, plan
        ends = plan_dense(self._dense_costs(ranks), 0, num_tokens)
        return self.cut(ranks, plan, tuple(zip((0, *ends), ends, strict=False)))

    def fixed(self, ranks: Ranks, num_tokens: int, length: int) -> Simulated:
        """Simulate a prompt in chunks of one length."""
        ladder = Ladder(longest=length, block_size=UNIT)
        cuts = (self._sparse_cuts(num_tokens, ladder) if self.sparse
                else tuple(ladder.parts(0, num_tokens)))
        return self.cut(ranks, f"fixed {length}", cuts)

    def cut(self, ranks: Ranks, plan: str, cuts: Cuts) -> Simulated:
        """Simulate a prompt that is cut so."""
        stages = self.stages(ranks)
        costs = self._layer_costs(ranks)
        times = [self._stage_times(costs, stages, start, stop) for start, stop in cuts]
        sends = [costs.send_s(stop - start) for start, stop in cuts]
        found = flow(times, sends, max_in_flight=ranks.pp + 1)
        return Simulated(ranks=ranks, plan=plan, cuts=cuts, flow=found, stages=tuple(stages),
                         waits=self._waits(ranks, stages, times, cuts))

    def stages(self, ranks: Ranks) -> list[range]:
        """Split the layers by the time that they take for a prompt of `SPLIT_LEN`."""
        costs = self._layer_costs(ranks)
        cuts = [(start, start + LONGEST) for start in range(0, SPLIT_LEN, LONGEST)]
        times = zip(*(costs.seconds(*cut) for cut in cuts), strict=True)
        return split_by_time(list(map(sum, times)), ranks.pp)

    def _sparse_cuts(self, num_tokens: int, ladder: Ladder) -> Cuts:
        return sparse_cuts(num_tokens, ladder, self.shape.plan.tail_len)

    def learned(self) -> Costs:
        """Return what an engine's latency model knows after one prompt of `SPLIT_LEN` tokens in
        chunks of 8,192 and one in chunks of 32,768 on one GPU."""
        model = LatencyModel()
        for length in (8_192, LONGEST):
            for start in range(0, SPLIT_LEN, length):
                model.observe(Work(dense=dense_terms(start, length)),
                              self._whole_s(start, start + length))
        return model.costs

    def _whole_s(self, start: int, stop: int) -> float:
        return self._assumed.stage_s + sum(self._layer_costs(Ranks()).seconds(start, stop))

    def _dense_costs(self, ranks: Ranks) -> DenseCosts:
        """Return what the planner is told: the learned costs, shared by the ranks."""
        fixed_s, token_s, pair_s = self.learned().dense
        sharers = ranks.cp * ranks.tp
        layers = self._layer_costs(ranks).seconds(SPLIT_LEN - LONGEST, SPLIT_LEN)
        times = [sum(layers[stage.start:stage.stop]) for stage in self.stages(ranks)]
        return DenseCosts(
            terms=(fixed_s, token_s / sharers, pair_s / sharers), unit_len=UNIT,
            stage_shares=tuple(time / sum(times) for time in times), shortest=SHORTEST,
            longest=LONGEST)

    def _stage_times(
        self, costs: LayerCosts, stages: Sequence[range], start: int, stop: int,
    ) -> list[float]:
        layers = costs.seconds(start, stop)
        return [self._assumed.stage_s + sum(layers[stage.start:stage.stop]) for stage in stages]

    def _waits(
        self, ranks: Ranks, stages: Sequence[range], times: Sequence[Sequence[float]], cuts: Cuts,
    ) -> float:
        """Return the share of the stages' time that a machine without waits would not need."""
        if ranks.cp * ranks.tp == 1:
            return 0.0
        ideal = self._layer_costs(ranks, waits=False)
        needed = sum(sum(self._stage_times(ideal, stages, *cut)) for cut in cuts)
        return 1 - needed / sum(map(sum, times))

    def _layer_costs(self, ranks: Ranks, *, waits: bool = True) -> LayerCosts:
        assumed = self._assumed if waits else Assumptions(
            stage_s=self._assumed.stage_s, collective_s=0.0, bytes_per_s=float("inf"), noise=0.0)
        key = ranks, assumed
        if key not in self._costs:
            self._costs[key] = LayerCosts(
                self.shape, self._rates, sparse=self.sparse, ranks=ranks, assumed=assumed)
        return self._costs[key]


def plans(sparse: bool, ranks: Ranks) -> tuple[str, ...]:
    """List the plans that are worth comparing on some GPUs."""
    if ranks.pp == 1:
        return f"fixed {LONGEST}", BEST
    return "fixed 8192", f"fixed {LONGEST}", BEST, "ladder" if sparse else "planned"
