"""`longspan bench cache` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspan.commands.options import Device, Results, parse_list

bench_cache_app = typer.Typer(rich_markup_mode=None)


@bench_cache_app.command("cache")
def bench_cache(
    shape: Annotated[str, typer.Option(
        help="qwen2.5-7b, qwen2.5-14b or nano; random weights.")] = "qwen2.5-7b",
    lengths: Annotated[str, typer.Option(help="Prompt tokens.")] = "131072",
    places: Annotated[str, typer.Option(
        help="host, disk, turns, copies, cancelled.")] = "host,disk",
    turns: Annotated[int, typer.Option(
        help="With turns, copies: times that each of two prompts is asked again.")] = 2,
    host_gib: Annotated[float | None, typer.Option(
        help="With turns, copies: host memory; default: for one of the two.")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Empty, on the disk to measure.")] =
        Path("kv-bench"),
    attention: Annotated[str, typer.Option(help="dense or sparse.")] = "sparse",
    device: Device = None,
    commit: Annotated[str | None, typer.Option(help="Where the source is without git.")] = None,
    out: Results = Path("bench/results"),
) -> None:
    """Time until a prompt's KV is back from host memory or disk, beside its prefill."""
    from longspan.bench.engine.cache import run
    from longspan.bench.engine.cache_options import CacheOptions
    from longspan.bench.session import BenchOptions, BenchSession
    from longspan.bench.shapes import Shape

    options = CacheOptions(
        lengths=parse_list(lengths, int, "--lengths"), folder=folder,
        places=parse_list(places, str, "--places"), attention=attention,
        turns=turns, host_gib=host_gib)
    session = BenchSession("cache", BenchOptions.make(device, out, commit, None))
    status = run(session, Shape.make(shape), options)
    if status:
        raise typer.Exit(status)
