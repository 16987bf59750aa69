"""``longspan train``: its subcommands and their options."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from longspan.commands.options import parse_length
from longspan.errors import LongspanError

train_app = typer.Typer(help="Train for long contexts.", rich_markup_mode=None)

Checkpoint = Annotated[Path, typer.Argument(
    help="Hugging Face directory of a Qwen2, Qwen3 or Llama shape.")]
Out = Annotated[Path, typer.Option(help="New folder; or that of a run that was cut.")]
TimeLimit = Annotated[float, typer.Option(
    help="Save and end after these seconds; the same command goes on.")]
TokensPerStep = Annotated[int | None, typer.Option(
    min=128, help="Of an optimizer step; default: 262,144 or so.")]
Seed = Annotated[int, typer.Option(help="Same seed, same losses.")]
Workers = Annotated[int | None, typer.Option(
    min=0, help="Processes that make rows; default: all cores but two.")]
RowsAtOnce = Annotated[int | None, typer.Option(
    min=1, help="Rows of a forward pass; gradients of several add up. Default: what fits.")]
Recompute = Annotated[bool, typer.Option(
    "--recompute", help="Recompute activations at once, not when memory is short.")]
Eager = Annotated[bool, typer.Option("--eager", help="Do not compile.")]
ContextParallel = Annotated[int, typer.Option(
    min=1, help="Processes that share each row, under torchrun.")]
DryRun = Annotated[bool, typer.Option(
    "--dry-run", help="Only print memory, tokens, operations and time of each phase.")]
Gpus = Annotated[int, typer.Option(min=1, help="Of a dry run.")]
GpuMemory = Annotated[float, typer.Option(min=0, help="GiB of each GPU, of a dry run.")]
GpuTflops = Annotated[float, typer.Option(min=0.1, help="TFLOP/s of each GPU, of a dry run.")]


@train_app.command()
def extend(
    checkpoint: Checkpoint,
    corpus: Annotated[list[str], typer.Option(
        help="Folder or file of text, repeatable; or a folder that longspan synth wrote.")],
    to: Annotated[str, typer.Option(help="Tokens of context, such as 131072 or 128k.")],
    out: Out,
    tokens: Annotated[float, typer.Option(min=1, help="To train on, over all phases.")] = 40e6,
    learning_rate: Annotated[float, typer.Option(min=0)] = 2e-5,
    phase: Annotated[list[str] | None, typer.Option(
        metavar="LENGTH:BASE:TOKENS:RATE", help="In place of the report's phases; repeatable.")] =
        None,
    synthetic: Annotated[float, typer.Option(
        min=0, max=1, help="Share of rows with tasks; the others are text.")] = 0.5,
    answer_weight: Annotated[float, typer.Option(min=0, help="Loss weight of answers.")] = 2.0,
    join_short: Annotated[bool, typer.Option(
        "--join-short", help="Tasks may read short documents as one.")] = False,
    held_out: Annotated[float, typer.Option(
        min=0, max=0.5, help="Share of the text that is set aside and measured.")] = 0.02,
    column: Annotated[str, typer.Option(help="Where records have their text.")] = "text",
    tokens_per_step: TokensPerStep = None, seed: Seed = 0, time_limit_s: TimeLimit = math.inf,
    workers: Workers = None, rows_at_once: RowsAtOnce = None, recompute: Recompute = False,
    eager: Eager = False, context_parallel: ContextParallel = 1, dry_run: DryRun = False,
    gpus: Gpus = 1, gpu_memory_gib: GpuMemory = 141, gpu_tflops: GpuTflops = 400,
) -> None:
    """Extend a checkpoint's context: the report's phases on text of your own."""
    from longspan.commands import extend as body
    from longspan.commands.training import Limits, TextRules, default_workers
    from longspan.data.documents import Reading
    from longspan.data.rows import WEIGHTS, Mixture
    from longspan.data.tokens import Kind
    from longspan.train.budget import Processes
    from longspan.train.checkpoint import open_base
    from longspan.train.phases import extension

    base = open_base(checkpoint)
    target = as_length("--to", to)
    phases = body.parse_phases(phase, tokens_per_step) if phase else tuple(extension(
        base.trained_len, base.config.rope_theta, target, num_tokens=round(tokens),
        learning_rate=learning_rate, tokens_per_step=tokens_per_step))
    if phases[-1].seq_len != target:
        raise LongspanError(f"--to {target}: the last --phase has rows of {phases[-1].seq_len}")
    tasks = sum(weight for name, weight in WEIGHTS.items() if name != "plain")
    weights = {name: synthetic * weight / tasks for name, weight in WEIGHTS.items()}
    mixture = Mixture(weights={**weights, "plain": 1 - synthetic})
    run = body.ExtendRun(
        checkpoint=checkpoint, corpus=tuple(corpus), out=out, phases=phases, seed=seed,
        kind_weights={Kind.PLANTED: 0.0, Kind.ANSWER: answer_weight},
        rules=TextRules(reading=Reading(column=column), mixture=mixture, held_out=held_out,
                        may_join=join_short),
        limits=Limits(
            time_limit_s=time_limit_s, eager=eager, recompute=recompute, rows_at_once=rows_at_once,
            num_workers=default_workers() if workers is None else workers,
            context_parallel=context_parallel))
    if dry_run:
        return body.dry_run(run, Processes(
            num=gpus, context_parallel=context_parallel, tflops=gpu_tflops,
            memory_gib=gpu_memory_gib))
    body.extend(run)


def as_length(option: str, text: str) -> int:
    """Parse a number of tokens. Raises `LongspanError`."""
    try:
        return parse_length(text)
    except ValueError:
        raise LongspanError(f"{option} {text}: write tokens, such as 131072 or 128k") from None
