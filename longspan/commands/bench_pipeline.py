"""`longspan bench pipeline` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspan.commands.options import (
    BudgetS,
    Commit,
    Device,
    Layers,
    Memory,
    Policy,
    Results,
    parse_list,
)
from longspan.commands.run_app import end_with
from longspan.commands.strict import Commands
from longspan.errors import LongspanError

bench_pipeline_app = Commands()


@bench_pipeline_app.command("pipeline")
def bench_pipeline(
    simulate: Annotated[bool, typer.Option(
        "--simulate", help="Compute it from what one GPU was measured to need.")] = False,
    shapes: Annotated[str, typer.Option(help="Shapes with released budgets; measured is the "
                                             "first.")] = "qwen2.5-7b,qwen2.5-14b",
    lengths: Annotated[str, typer.Option(help="Prompt tokens.")] = "131072,262144,524288,1000000",
    attention: Annotated[str, typer.Option(help="dense, sparse, or both.")] = "sparse,dense",
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, simulated.")] = "2,4,8",
    ranks: Annotated[str, typer.Option(
        help="Arrangements measured, in their order: 1, cp2, pp2, tp2, cp2xpp2.")] =
        "1,cp2,pp2,tp2",
    chunk_lens: Annotated[str, typer.Option(help="Fixed chunks that are measured, tokens.")] =
        "8192,32768,131072",
    rates_of: Annotated[str | None, typer.Option(
        help="Device of the rows of bench ttft and ops that a simulation starts from; default: "
             "nvidia-h200 with --simulate, else none.")] = None,
    decode: Annotated[int, typer.Option(
        min=0, help="Decode steps that are timed behind each length.")] = 0,
    users: Annotated[int, typer.Option(
        min=1, help="Prompts of each length that are handed in together besides.")] = 1,
    layers: Layers = None, policy: Policy = "", memory_gib: Memory = None, device: Device = None,
    commit: Commit = None, budget_s: BudgetS = None, out: Results = Path("bench/results"),
) -> None:
    """Time to first token and idle time of one prompt on several GPUs."""
    names = parse_list(shapes, str, "--shapes")
    kinds = parse_list(attention, str, "--attention")
    for name in kinds:
        if name not in ("dense", "sparse"):
            raise LongspanError(f"--attention: {name!r} is not one of dense, sparse")
    if simulate:
        from longspan.bench.pipeline.command import SimulateOptions
        from longspan.bench.pipeline.command import simulate as run

        run(SimulateOptions(
            shapes=names, lengths=parse_list(lengths, int, "--lengths"), attention=kinds,
            rates_of=rates_of or "nvidia-h200", out=out, counts=parse_list(gpus, int, "--gpus")))
        return
    from longspan.bench.pipeline.measure import MeasureOptions, measure, parse_arrangement
    from longspan.bench.session import BenchOptions, BenchSession
    from longspan.bench.shapes import PlanOptions, Shape

    options = MeasureOptions(
        lengths=parse_list(lengths, int, "--lengths"), attention=kinds, layers=layers,
        arrangements=tuple(map(parse_arrangement, parse_list(ranks, str, "--ranks"))),
        chunk_lens=parse_list(chunk_lens, int, "--chunk-lens"), memory_gib=memory_gib,
        rates_of=rates_of or "", decode_steps=decode, users=users)
    session = BenchSession("pipeline", BenchOptions.make(device, out, commit, budget_s))
    end_with(measure(session, Shape.make(names[0], PlanOptions(policy=policy)), options))
