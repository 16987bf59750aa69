"""Rates from committed rows, and what a simulation makes of them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from longspan.bench.pipeline.command import SimulateOptions, arrangements
from longspan.bench.pipeline.costs import LayerCosts, Ranks
from longspan.bench.pipeline.rates import ASSUMED, PLAN, Assumptions, read_rates
from longspan.bench.pipeline.simulate import Simulator, plans
from longspan.bench.shapes import Shape
from longspan.commands.results import read_file
from longspan.errors import LongspanError

RESULTS = Path(__file__).parents[3] / "bench" / "results"
SHAPES = {name: Shape.make(name) for name in ("qwen2.5-7b", "qwen2.5-14b")}
RATES = {name: read_rates(shape, RESULTS, "nvidia-h200") for name, shape in SHAPES.items()}
ROWS = [row for row in read_file(RESULTS / "ttft.nvidia-h200.json")["rows"]
        if row["shape"] in SHAPES and row["plan"] in (None, PLAN)]
FREE = Assumptions(stage_s=0.0, hop_s=0.0, collective_s=0.0, bytes_per_s=float("inf"), noise=0.0)


def simulator(name: str, *, sparse: bool, assumed: Assumptions = ASSUMED) -> Simulator:
    return Simulator(SHAPES[name], RATES[name], sparse=sparse, assumed=assumed)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "{shape}-{attention}-{num_tokens}-{chunk_len}"
                         .format(**row))
def test_the_simulation_gives_the_measured_rows_back(row: dict) -> None:
    sim = simulator(row["shape"], sparse=row["attention"] == "sparse")
    found = sim.fixed(Ranks(), row["num_tokens"], row["chunk_len"])
    # A row of two layers holds one layer's products and a bit: scaled to all, it errs low.
    slack = 0.05 if row["layers"] > 2 else 0.08
    assert found.ttft_s == pytest.approx(row["ttft_scaled_s"], rel=slack)


def test_ranks_that_wait_for_nothing_share_the_work() -> None:
    for sparse in (True, False):
        sim = simulator("qwen2.5-7b", sparse=sparse, assumed=FREE)
        one, cp = (sim.fixed(Ranks(cp=count), 131_072, 32_768) for count in (1, 4))
        # a selection's fixed part is everyone's
        assert 0.249 * one.ttft_s <= cp.ttft_s <= 0.27 * one.ttft_s
        assert cp.idle == [0.0]


def test_a_pipeline_is_capped_by_its_layers() -> None:
    sim = simulator("qwen2.5-7b", sparse=False, assumed=FREE)
    one = sim.fixed(Ranks(), 1_000_000, 1_024).ttft_s
    caps = {2: 27.02 / 14, 4: 27.02 / 7, 8: 27.02 / 4}
    for count, cap in caps.items():
        speedup = one / sim.fixed(Ranks(pp=count), 1_000_000, 1_024).ttft_s
        assert 0.97 * cap < speedup <= 1.001 * cap


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("sparse", "slack"), [(True, 1.045), (False, 1.01)])
def test_ladder_and_plan_are_near_the_best_fixed_chunk(
    name: str, sparse: bool, slack: float,
) -> None:
    sim = simulator(name, sparse=sparse)
    for count in (2, 4):
        for num_tokens in (131_072, 262_144, 524_288, 1_000_000):
            *_, best, own = (sim.run(Ranks(pp=count), plan, num_tokens)
                             for plan in plans(sparse, Ranks(pp=count)))
            assert own.ttft_s <= slack * best.ttft_s, (name, sparse, count, num_tokens)


def test_ranks_of_a_stage_share_its_work() -> None:
    for sparse, plan in ((True, "ladder"), (False, "planned")):
        sim = simulator("qwen2.5-7b", sparse=sparse, assumed=FREE)
        found = sim.run(Ranks(cp=2, pp=2), plan, 262_144)
        alone = sim.cut(Ranks(pp=2), plan, found.cuts)
        # a selection's fixed part is everyone's
        assert 0.499 * alone.ttft_s <= found.ttft_s <= 0.52 * alone.ttft_s
        assert found.stages == alone.stages and len(found.idle) == 2


def test_stages_compute_one_chunk_at_a_time_in_order() -> None:
    found = simulator("qwen2.5-7b", sparse=True).run(Ranks(pp=4), "ladder", 131_072)
    for stage in range(4):
        spans = [(begun[stage], done[stage]) for begun, done in zip(
            found.flow.begun_s, found.flow.done_s, strict=True)]
        assert all(left[1] <= right[0] for left, right in pairwise(spans))
    for begun, done in zip(found.flow.begun_s, found.flow.done_s, strict=True):
        assert all(done[stage] < begun[stage + 1] for stage in range(3))
    assert all(0 < idle < 0.5 for idle in found.idle)


def test_kv_groups_are_dealt_so_that_ranks_have_equal_budgets() -> None:
    rates = RATES["qwen2.5-7b"]
    two, four = (LayerCosts(SHAPES["qwen2.5-7b"], rates, sparse=True, ranks=Ranks(tp=count),
                            assumed=FREE) for count in (2, 4))
    one = LayerCosts(SHAPES["qwen2.5-7b"], rates, sparse=True, ranks=Ranks(), assumed=FREE)
    whole, halves, quarters = (sum(costs.seconds(500_000, 532_768)) for costs in (one, two, four))
    assert 0.5 * whole < halves < 0.53 * whole  # the norms and uneven heads
    assert 0.27 * whole < quarters < 0.34 * whole  # one group a rank: nothing to deal


def test_arrangements_fit_the_model() -> None:
    names = [ranks.label for ranks in arrangements(SHAPES["qwen2.5-7b"].model, (2, 4, 8))]
    assert names == ["one GPU", "cp2", "pp2", "tp2", "cp4", "pp4", "tp4", "cp2 pp2", "cp8", "pp8",
                     "cp4 pp2", "pp4 tp2", "cp4 tp2"]


def test_what_a_person_can_get_wrong(tmp_path: Path) -> None:
    with pytest.raises(LongspanError, match="ttft.none.json: no such file"):
        read_rates(SHAPES["qwen2.5-7b"], RESULTS, "none")
    with pytest.raises(LongspanError, match="no rows of bench ttft for qwen3-30b-a3b"):
        read_rates(Shape.make("qwen3-30b-a3b"), RESULTS, "nvidia-h200")
    with pytest.raises(LongspanError, match="--gpus 3: a power of two"):
        SimulateOptions(shapes=("qwen2.5-7b",), lengths=(1,), attention=("dense",), counts=(3,),
                        rates_of="x", out=tmp_path)
    with pytest.raises(LongspanError, match="--attention: 'both'"):
        SimulateOptions(shapes=("qwen2.5-7b",), lengths=(1,), attention=("both",), counts=(2,),
                        rates_of="x", out=tmp_path)
