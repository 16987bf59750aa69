"""Rates from committed rows, and what a simulation makes of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from longspan.bench.pipeline.command import SimulateOptions, arrangements
from longspan.bench.pipeline.costs import LayerCosts, Ranks
from longspan.bench.pipeline.rates import ASSUMED, Assumptions, is_timed, read_rates
from longspan.bench.pipeline.simulate import Simulator, plans
from longspan.bench.pipeline.steps import SHORTEST, num_selections, read_steps
from longspan.bench.shapes import Shape
from longspan.commands.results import read_file
from longspan.errors import LongspanError

RESULTS = Path(__file__).parents[3] / "bench" / "results"
SHAPES = {name: Shape.make(name) for name in ("qwen2.5-7b", "qwen2.5-14b")}
RATES = {name: read_rates(shape, RESULTS, "nvidia-h200") for name, shape in SHAPES.items()}
DENSE = [row for row in read_file(RESULTS / "ttft.nvidia-h200.json")["rows"]
         if row["shape"] in SHAPES and row["plan"] is None]
MEASURED = [row for row in read_file(RESULTS / "pipeline.nvidia-h200.json")["rows"]
            if row["source"] == "measured" and row["attention"] == "sparse"
            and row["plan"].startswith("fixed ")]
TIMED = [row for row in MEASURED if is_timed(row, SHAPES["qwen2.5-7b"])]
FREE = Assumptions(stage_s=0.0, hop_s=0.0, collective_s=0.0, bytes_per_s=float("inf"), noise=0.0)


def simulator(
    name: str, *, sparse: bool, assumed: Assumptions = ASSUMED, selection: float = 1.0,
) -> Simulator:
    """Simulate a shape, with selections that take so much of what was measured."""
    rates = RATES[name]
    fixed, context = rates.sparse.selection_s
    cheaper = replace(rates.sparse, selection_s=(selection * fixed, selection * context))
    return Simulator(SHAPES[name], replace(rates, sparse=cheaper), sparse=sparse, assumed=assumed)


def label(row: dict) -> str:
    ranks = Ranks(cp=row.get("cp", 1), pp=row.get("pp", 1), tp=row.get("tp", 1)).label
    return f"{row['shape']}-{ranks}-{row['num_tokens']}-{row['plan']}-{row.get('chunk_len')}"


@pytest.mark.parametrize("row", DENSE, ids=label)
def test_the_simulation_gives_dense_rows_back(row: dict) -> None:
    found = simulator(row["shape"], sparse=False).fixed(
        Ranks(), row["num_tokens"], row["chunk_len"])
    # A row of two layers holds one layer's products and a bit: scaled to all, it errs low.
    slack = 0.05 if row["layers"] > 2 else 0.08
    assert found.ttft_s == pytest.approx(row["ttft_scaled_s"], rel=slack)


@pytest.mark.parametrize("row", MEASURED, ids=label)
def test_the_simulation_gives_sparse_rows_back(row: dict) -> None:
    """One GPU's are what it comes from; those of several are not."""
    ranks = Ranks(cp=row["cp"], pp=row["pp"], tp=row["tp"])
    found = simulator(row["shape"], sparse=True).fixed(
        ranks, row["num_tokens"], int(row["plan"].removeprefix("fixed ")))
    assert len(found.cuts) == row["num_chunks"]
    # Rows are of several cards, which differ by 2 to 3 %; no step of the 14B's was measured.
    slack = 0.04 if ranks == Ranks() else 0.06 if row["shape"] == "qwen2.5-7b" else 0.1
    assert found.ttft_s == pytest.approx(row["ttft_s"], rel=slack)


@pytest.mark.parametrize("row", TIMED, ids=label)
def test_chunks_of_every_length_take_what_they_were_measured_to(row: dict) -> None:
    sim = simulator("qwen2.5-7b", sparse=True)
    steps = [step for step in read_steps(row, SHAPES["qwen2.5-7b"].plan.tail_len)
             if step.stop - step.start > SHORTEST]
    for step in steps:
        found = sim.cut(Ranks(), "", [(step.start, step.stop)])
        assert found.ttft_s == pytest.approx(step.seconds, rel=0.1)


def test_short_chunks_were_measured_too() -> None:
    lengths = {int(row["plan"].removeprefix("fixed ")) for row in TIMED}
    assert lengths >= {8_192, 16_384, 32_768, 126_976}


def test_a_chunk_across_a_border_of_dca_is_selected_for_twice() -> None:
    assert [num_selections(start, stop, 100) for start, stop in (
        (0, 100), (0, 101), (99, 101), (100, 200), (50, 250))] == [1, 2, 2, 1, 3]
    sim = simulator("qwen2.5-7b", sparse=True)
    across, beside = (sim.cut(Ranks(), "", [cut]).ttft_s for cut in (
        (253_952 - 128, 253_952 + 3_968), (253_952, 253_952 + 4_096)))
    assert 1.3 * beside < across < 2 * beside


def test_ranks_that_wait_for_nothing_share_the_work() -> None:
    for sparse in (True, False):
        sim = simulator("qwen2.5-7b", sparse=sparse, assumed=FREE)
        one, cp = (sim.fixed(Ranks(cp=count), 131_072, 32_768) for count in (1, 4))
        # a selection's fixed part is everyone's
        assert 0.249 * one.ttft_s <= cp.ttft_s <= 0.3 * one.ttft_s
        assert cp.idle == [0.0]


def test_a_pipeline_is_capped_by_its_layers() -> None:
    sim = simulator("qwen2.5-7b", sparse=False, assumed=FREE)
    one = sim.fixed(Ranks(), 1_000_000, 1_024).ttft_s
    caps = {2: 27.02 / 14, 4: 27.02 / 7, 8: 27.02 / 4}
    for count, cap in caps.items():
        speedup = one / sim.fixed(Ranks(pp=count), 1_000_000, 1_024).ttft_s
        assert 0.97 * cap < speedup <= 1.001 * cap


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("selection", [1.0, 2 / 3])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_ladder_is_near_the_best_fixed_chunk(
    name: str, selection: float, count: int,
) -> None:
    """With selections as measured, and a third cheaper."""
    sim = simulator(name, sparse=True, selection=selection)
    for num_tokens in (131_072, 262_144, 524_288, 1_000_000):
        *_, best, own = (sim.run(Ranks(pp=count), plan, num_tokens)
                         for plan in plans(True, Ranks(pp=count)))
        assert own.ttft_s <= 1.045 * best.ttft_s, num_tokens


@pytest.mark.parametrize("name", SHAPES)
def test_the_ladder_stays_useful_between_and_below(name: str) -> None:
    """At lengths that it was not chosen by."""
    sim = simulator(name, sparse=True)
    for count in (2, 4, 8):
        for num_tokens in (65_536, 98_304, 196_608, 393_216, 786_432):
            *_, best, own = (sim.run(Ranks(pp=count), plan, num_tokens)
                             for plan in plans(True, Ranks(pp=count)))
            assert own.ttft_s <= 1.085 * best.ttft_s, (count, num_tokens)


@pytest.mark.parametrize("name", SHAPES)
def test_a_plan_is_near_the_best_fixed_chunk(name: str) -> None:
    sim = simulator(name, sparse=False)
    for count in (2, 4):
        for num_tokens in (131_072, 262_144, 524_288, 1_000_000):
            *_, best, own = (sim.run(Ranks(pp=count), plan, num_tokens)
                             for plan in plans(False, Ranks(pp=count)))
            assert own.ttft_s <= 1.01 * best.ttft_s, (name, count, num_tokens)


def test_ranks_of_a_stage_share_its_work() -> None:
    for sparse, plan in ((True, "ladder"), (False, "planned")):
        sim = simulator("qwen2.5-7b", sparse=sparse, assumed=FREE)
        found = sim.run(Ranks(cp=2, pp=2), plan, 262_144)
        alone = sim.cut(Ranks(pp=2), plan, found.cuts)
        # a selection's fixed part is everyone's
        assert 0.499 * alone.ttft_s <= found.ttft_s <= 0.54 * alone.ttft_s
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
    assert 0.5 * whole < halves < 0.56 * whole  # the norms, uneven heads, a selection's fixed part
    assert 0.27 * whole < quarters < 0.38 * whole  # one group a rank: nothing to deal


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
