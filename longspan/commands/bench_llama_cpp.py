"""`longspan bench llama-cpp` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspan.commands.options import Attention, Quantization, Results, Threads

bench_llama_cpp_app = typer.Typer(rich_markup_mode=None)


@bench_llama_cpp_app.command("llama-cpp")
def bench_llama_cpp(
    model: Annotated[str, typer.Argument(help="Directory of the checkpoint.")],
    gguf: Annotated[Path, typer.Argument(help="The same model for llama.cpp.")],
    node_dir: Annotated[Path, typer.Option(
        help="Folder where `npm i -E node-llama-cpp@3.21.1` was run.")] = Path("."),
    length: Annotated[int, typer.Option(min=16, help="Prompt tokens.")] = 1024,
    answer: Annotated[int, typer.Option(min=1, help="Tokens decoded.")] = 32,
    attention: Attention = "auto", quantization: Quantization = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are reported.")] = 5,
    threads: Threads = None, out: Results = Path("bench/results"),
) -> None:
    """Prefill and decode on a CPU beside llama.cpp, in turns."""
    from longspan.bench.engine.beside import BesideOptions, run

    run(BesideOptions(
        model=model, gguf=gguf, node_dir=node_dir, length=length, num_answer=answer,
        attention=attention, rounds=rounds, threads=threads, quantization=quantization), out)
