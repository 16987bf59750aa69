"""`longspan bench pipeline` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspan.commands.options import Results, parse_list
from longspan.errors import LongspanError


def bench_pipeline(
    simulate: Annotated[bool, typer.Option(
        "--simulate", help="Compute it from what one GPU was measured to need.")] = False,
    shapes: Annotated[str, typer.Option(help="Shapes with released budgets.")] =
        "qwen2.5-7b,qwen2.5-14b",
    lengths: Annotated[str, typer.Option(help="Prompt tokens.")] = "131072,262144,524288,1000000",
    attention: Annotated[str, typer.Option(help="dense, sparse, or both.")] = "sparse,dense",
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs.")] = "2,4,8",
    rates_of: Annotated[str, typer.Option(
        help="Device of the rows of bench ttft and ops that it starts from.")] = "nvidia-h200",
    out: Results = Path("bench/results"),
) -> None:
    """Time to first token and idle time of one prompt on several GPUs."""
    from longspan.bench.pipeline.command import SimulateOptions
    from longspan.bench.pipeline.command import simulate as run

    if not simulate:
        raise LongspanError("longspan bench pipeline computes with --simulate alone; add it")
    run(SimulateOptions(
        shapes=parse_list(shapes, str, "--shapes"), lengths=parse_list(lengths, int, "--lengths"),
        attention=parse_list(attention, str, "--attention"), rates_of=rates_of, out=out,
        counts=parse_list(gpus, int, "--gpus")))
