"""`longspan bench pipeline --simulate`: prefills on several GPUs, from what one GPU was measured to
need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspan.bench.pipeline.costs import Ranks
from longspan.bench.pipeline.rates import ASSUMED, Rates, read_rates
from longspan.bench.pipeline.simulate import BEST, Simulated, Simulator, plans
from longspan.bench.shapes import Shape
from longspan.bench.timing import rounded
from longspan.commands.console import note, seconds, show_table
from longspan.commands.results import describe_run, read_file, write_rows
from longspan.config import ModelConfig
from longspan.errors import LongspanError

SIMULATED = "simulated"
TIMELINES = (131_072, 4)
"""Prompt length and stages whose rows hold what each stage did when."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulateOptions:
    """What was asked for on the command line."""

    shapes: tuple[str, ...]
    lengths: tuple[int, ...]
    """Prompt lengths, tokens."""
    attention: tuple[str, ...]
    counts: tuple[int, ...]
    """Numbers of GPUs."""
    rates_of: str
    """Device of the rows that the rates come from, as in their files' names."""
    out: Path
    """Folder of result files, read and written."""

    def __post_init__(self) -> None:
        for name in self.attention:
            if name not in ("dense", "sparse"):
                raise LongspanError(f"--attention: {name!r} is not one of dense, sparse")
        for count in self.counts:
            if count < 2 or count & (count - 1):
                raise LongspanError(f"--gpus {count}: a power of two from 2 on is needed")


def simulate(options: SimulateOptions) -> None:
    """Simulate, write rows, print the table."""
    rows = []
    for name in options.shapes:
        shape = Shape.make(name)
        rates = read_rates(shape, options.out, options.rates_of)
        for attention in options.attention:
            simulator = Simulator(shape, rates, sparse=attention == "sparse")
            for length in options.lengths:
                rows += _rows(simulator, length, options.counts)
            note(f"{name}, {attention}: simulated")
    file = write_rows(options.out, "pipeline", rows, about=_about(options))
    show(rows)
    note(f"{file}: {len(rows)} rows, simulated")


def arrangements(model: ModelConfig, counts: Sequence[int]) -> Iterator[Ranks]:
    """List the ways in which so many GPUs may work on one prompt, one GPU first."""
    yield Ranks()
    for count in counts:
        yield Ranks(cp=count)
        if count <= model.num_layers:
            yield Ranks(pp=count)
        if model.num_kv_heads % count == 0:
            yield Ranks(tp=count)
        if count >= 4:
            yield Ranks(cp=count // 2, pp=2)
        if count >= 8 and model.num_kv_heads % 2 == 0:
            yield Ranks(pp=count // 2, tp=2)
            yield Ranks(cp=count // 2, tp=2)


def rates_summary(name: str, rates: Rates) -> dict[str, Any]:
    """Return rates, their origin and the assumptions of a simulation, as its file holds them."""
    fields = ("linear_s", "rest_s", "norm_s", "dense_pair_s")
    values = {**{field: getattr(rates, field) for field in fields}, **asdict(rates.sparse)}
    return {"shape": name, "rates": {
        field: {"value": [rounded(part, 4) for part in value] if isinstance(value, tuple)
                else rounded(value, 4), "from": rates.sources[field]}
        for field, value in values.items()}}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print times, speed-ups and idle shares as a table on stdout."""
    show_table("time to first token, simulated", (
        "shape", "attention", "tokens", "GPUs", "plan", "chunks", "TTFT", "speed-up", "idle"), [
        (row["shape"], row["attention"], f"{row['num_tokens']:,}",
         Ranks(cp=row["cp"], pp=row["pp"], tp=row["tp"]).label, row["plan"], row["num_chunks"],
         seconds(row["ttft_s"]), f"{row['speedup']:.2f}x", f"{100 * row['idle']:.0f} %")
        for row in rows])


def _rows(simulator: Simulator, num_tokens: int, counts: Sequence[int]) -> list[dict[str, Any]]:
    rows = list[dict[str, Any]]()
    base_s = 0.0
    for ranks in arrangements(simulator.shape.model, counts):
        for plan in plans(simulator.sparse, ranks):
            found = simulator.run(ranks, plan, num_tokens)
            base_s = base_s or found.ttft_s
            rows.append(_row(simulator, num_tokens, plan, found, base_s))
    return rows


def _row(
    simulator: Simulator, num_tokens: int, plan: str, found: Simulated, base_s: float,
) -> dict[str, Any]:
    ranks, lengths = found.ranks, [stop - start for start, stop in found.cuts]
    idle = found.idle
    row: dict[str, Any] = {
        "shape": simulator.shape.name, "num_tokens": num_tokens,
        "attention": "sparse" if simulator.sparse else "dense",
        "cp": ranks.cp, "pp": ranks.pp, "tp": ranks.tp, "plan": plan, "source": SIMULATED,
        "ttft_s": rounded(found.ttft_s, 4), "speedup": rounded(base_s / found.ttft_s, 4),
        "idle": rounded(sum(idle) / len(idle), 3), "num_chunks": len(lengths),
        "longest_chunk": max(lengths), "shortest_chunk": min(lengths[:-1] or lengths)}
    if ranks.pp > 1:
        row["idle_by_stage"] = [rounded(value, 3) for value in idle]
        row["layers_by_stage"] = [len(stage) for stage in found.stages]
    if plan == BEST:
        row["chunk_len"] = int(found.plan.removeprefix("fixed "))
    if (num_tokens, ranks.pp) == TIMELINES and ranks.count == ranks.pp:
        row["timeline_ms"] = [
            [[round(1e3 * begun[stage], 1), round(1e3 * done[stage], 1)] for begun, done in zip(
                found.flow.begun_s, found.flow.done_s, strict=True)] for stage in range(ranks.pp)]
    return row


def _about(options: SimulateOptions) -> dict[str, Any]:
    """Describe the run: no device computed it, and its name says so."""
    measured = read_file(options.out / f"ttft.{options.rates_of}.json")["device"]
    shapes = [Shape.make(name) for name in options.shapes]
    return {
        **describe_run("cpu"),
        "device": {**measured, "name": f"simulated {measured['name']}", "driver": None},
        "assumed": {field: getattr(ASSUMED, field) for field in type(ASSUMED).__slots__},
        "rates": [rates_summary(shape.name, read_rates(shape, options.out, options.rates_of))
                  for shape in shapes]}
