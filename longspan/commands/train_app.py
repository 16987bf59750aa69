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
    recipe: Annotated[str | None, typer.Option(
        help="Phases of qwen2.5-7b-1m or qwen2.5-14b-1m.")] = None,
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
    from longspan.commands.training import Limits, default_workers
    from longspan.data.documents import Reading
    from longspan.data.rows import WEIGHTS, Mixture
    from longspan.data.tokens import Kind
    from longspan.recipes import find_extension
    from longspan.recipes.recipe import DataRules
    from longspan.train.budget import Processes
    from longspan.train.checkpoint import open_base
    from longspan.train.phases import extension

    base = open_base(checkpoint)
    target = as_length("--to", to)
    if recipe is not None:
        phases = find_extension(recipe).phases
    elif phase:
        phases = body.parse_phases(phase, tokens_per_step)
    else:
        phases = tuple(extension(
            base.trained_len, base.config.rope_theta, target, num_tokens=round(tokens),
            learning_rate=learning_rate, tokens_per_step=tokens_per_step))
    if phases[-1].seq_len != target:
        raise LongspanError(f"--to {target}: the last phase has rows of {phases[-1].seq_len}")
    tasks = sum(weight for name, weight in WEIGHTS.items() if name != "plain")
    weights = {name: synthetic * weight / tasks for name, weight in WEIGHTS.items()}
    mixture = Mixture(weights={**weights, "plain": 1 - synthetic})
    run = body.ExtendRun(
        checkpoint=checkpoint, corpus=tuple(corpus), out=out, phases=phases, seed=seed,
        kind_weights={Kind.PLANTED: 0.0, Kind.ANSWER: answer_weight},
        rules=DataRules(reading=Reading(column=column), mixture=mixture, held_out=held_out,
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


@train_app.command()
def sft(
    checkpoint: Checkpoint,
    data: Annotated[list[Path], typer.Option(
        help="JSONL of {messages: [{role, content}]}, short rows; repeatable.")],
    out: Out,
    long_data: Annotated[list[Path] | None, typer.Option(
        help="The same of the second stage, short and long rows mixed; repeatable.")] = None,
    max_length: Annotated[str, typer.Option(help="Longest row of the first stage.")] = "32k",
    long_max_length: Annotated[str, typer.Option(help="Longest of the second.")] = "256k",
    learning_rate: Annotated[float, typer.Option(min=0)] = 7e-6,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    tokens_per_step: TokensPerStep = None, seed: Seed = 0, time_limit_s: TimeLimit = math.inf,
    rows_at_once: RowsAtOnce = None, recompute: Recompute = False, eager: Eager = False,
    context_parallel: ContextParallel = 1,
) -> None:
    """Fine-tune on conversations, in the report's two stages; only answers are learned."""
    from longspan.commands import tune as body
    from longspan.commands.training import Limits

    stages = [body.Stage(name="stage 1", files=tuple(data),
                         max_length=as_length("--max-length", max_length))]
    if long_data:
        stages.append(body.Stage(name="stage 2", files=tuple(long_data),
                                 max_length=as_length("--long-max-length", long_max_length)))
    body.sft(body.SftRun(
        checkpoint=checkpoint, stages=tuple(stages), out=out, learning_rate=learning_rate,
        epochs=epochs, tokens_per_step=tokens_per_step or 262_144, seed=seed, limits=Limits(
            time_limit_s=time_limit_s, eager=eager, recompute=recompute, rows_at_once=rows_at_once,
            context_parallel=context_parallel)))


@train_app.command()
def dpo(
    checkpoint: Checkpoint,
    data: Annotated[list[Path], typer.Option(
        help="JSONL of {messages or prompt, chosen, rejected}; repeatable.")],
    out: Out,
    max_length: Annotated[str, typer.Option(help="Longest question with its answer.")] = "8k",
    beta: Annotated[float, typer.Option(min=0, help="How far answers may move.")] = 0.1,
    by_length: Annotated[bool, typer.Option(
        "--by-length", help="Compare mean log-probabilities of tokens, not sums.")] = False,
    sft_weight: Annotated[float, typer.Option(
        min=0, help="Weight of the better answer's own loss.")] = 0.1,
    learning_rate: Annotated[float, typer.Option(min=0)] = 7e-7,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    tokens_per_step: TokensPerStep = None, seed: Seed = 0, time_limit_s: TimeLimit = math.inf,
    rows_at_once: RowsAtOnce = None, recompute: Recompute = False, eager: Eager = False,
    context_parallel: ContextParallel = 1,
) -> None:
    """Prefer better answers to worse ones (DPO), on short pairs."""
    from longspan.commands import tune as body
    from longspan.commands.training import Limits

    body.dpo(body.DpoRun(
        checkpoint=checkpoint, files=tuple(data), out=out, beta=beta, by_length=by_length,
        max_length=as_length("--max-length", max_length), sft_weight=sft_weight,
        learning_rate=learning_rate, epochs=epochs, tokens_per_step=tokens_per_step or 131_072,
        seed=seed, limits=Limits(
            time_limit_s=time_limit_s, eager=eager, recompute=recompute, rows_at_once=rows_at_once,
            context_parallel=context_parallel)))


@train_app.command()
def nano(
    out: Out,
    root: Annotated[list[str] | None, typer.Option(
        metavar="DIR=MB", help="Text, and megabytes of it to read; repeatable.")] = None,
    tokens: Annotated[list[str] | None, typer.Option(
        metavar="PHASE=MILLIONS", help="Tokens of one phase; repeatable.")] = None,
    until: Annotated[str, typer.Option(
        help="Last piece: corpus, pretrain, practice, sft, dpo.")] = "dpo",
    base: Annotated[Path | None, typer.Option(
        help="Pre-trained checkpoint, in place of the phases.")] = None,
    shards: Annotated[Path | None, typer.Option(
        help="Also export the last piece there, in files of 14 MB.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A toy, in seconds on a CPU.")] = False,
    time_limit_s: TimeLimit = math.inf, workers: Workers = None, recompute: Recompute = False,
    eager: Eager = False,
) -> None:
    """Make the bundled model from raw text: corpus, phases, fine-tuning, preferences."""
    from longspan.commands import nano as body
    from longspan.commands.train import parse_amounts
    from longspan.commands.training import Limits, default_workers
    from longspan.data.documents import Root
    from longspan.recipes import nano as recipes

    roots = [Root(path=path, max_bytes=size)
             for path, size in parse_amounts("--root", root or ()).items()]
    body.run(body.NanoJob(
        recipe=recipes.smoke() if smoke else recipes.nano(), roots=roots, out=out, until=until,
        num_tokens=parse_amounts("--tokens", tokens or ()), base=base, shards=shards,
        limits=Limits(time_limit_s=time_limit_s, eager=eager, recompute=recompute,
                      num_workers=default_workers() if workers is None else workers)))


@train_app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="qwen2.5-7b-1m or qwen2.5-14b-1m.")],
    gpus: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's.")] = None,
    context_parallel: Annotated[int | None, typer.Option(
        min=1, help="GPUs that share a row; default: the recipe's.")] = None,
    gpu_memory_gib: GpuMemory = 80, gpu_tflops: GpuTflops = 400,
) -> None:
    """Print what one of the report's own models takes at its real scale."""
    from longspan.commands.training import show_plan
    from longspan.recipes import find_extension
    from longspan.train.budget import Processes
    from longspan.train.budget import plan as costs

    found = find_extension(recipe)
    processes = Processes(
        num=gpus or found.num_gpus, tflops=gpu_tflops, memory_gib=gpu_memory_gib,
        context_parallel=context_parallel or found.context_parallel)
    show_plan(f"{recipe} on {processes.num} GPUs of {gpu_memory_gib:g} GiB, "
              f"{processes.context_parallel} to a row", costs(
                  found.config, found.phases, processes))


@train_app.command()
def join(
    shards: Annotated[Path, typer.Argument(help="What --shards wrote.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint to write.")],
) -> None:
    """Join the small files of an export to a checkpoint."""
    from longspan.train.export import join_shards

    join_shards(shards, out)


@train_app.command()
def results(
    log: Annotated[Path, typer.Argument(help="log.jsonl of a run.")],
    file: Annotated[Path, typer.Argument(help="Result file to write.")],
    model: Annotated[str, typer.Option(help="Its name in the rows.")],
    command: Annotated[str, typer.Option(help="What ran.")],
    commit: Annotated[str, typer.Option(help="Of the code that ran.")] = "unknown",
) -> None:
    """Write the result rows of a run."""
    from longspan.train.report import write_results

    write_results(log, file, model=model, command=command, commit=commit)


def as_length(option: str, text: str) -> int:
    """Parse a number of tokens. Raises `LongspanError`."""
    try:
        return parse_length(text)
    except ValueError:
        raise LongspanError(f"{option} {text}: write tokens, such as 131072 or 128k") from None
