"""`longspan eval`: its subcommands and their options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from longspan.commands.options import (
    ChunkLen,
    Device,
    Dtype,
    MaxModelLen,
    Memory,
    Model,
    Plan,
    Quantization,
    Threads,
    parse_length,
    parse_list,
)
from longspan.commands.strict import Commands

eval_app = Commands(help="Score a model on long-context tasks.", rich_markup_mode=None)

TaskNames = Annotated[list[str], typer.Option(
    "--task", help="Task or suite, see longspan eval list; repeatable, or with commas between.")]
Lengths = Annotated[str | None, typer.Option(
    help="Tokens of prompt and answer, such as 4096, 32k or 1m, with commas between.")]
Count = Annotated[int, typer.Option("-n", "--n", help="Questions of each task and length.")]
Seed = Annotated[int, typer.Option(help="Same seed, same prompts.")]
TextRoots = Annotated[list[Path] | None, typer.Option(
    help="Folder of texts for haystacks; default: installed packages that nano never read.")]
Words = Annotated[Path | None, typer.Option(
    help="File of words, one a line, for lists of words; default: built in.")]
Data = Annotated[Path | None, typer.Option(
    help="Folder with the files of LV-Eval, LongBench, SQuAD or HotpotQA.")]
Depths = Annotated[int, typer.Option(help="Depths of the needle grid.")]
Questions = Annotated[int, typer.Option(help="Passkey questions about one document.")]
Distractors = Annotated[int, typer.Option(help="Passkeys in it that nobody asks for.")]
Template = Annotated[str, typer.Option(
    help="chat: the tokenizer's template around prompts; none: plain text.")]
Prefix = Annotated[str, typer.Option(
    help="Where RULER's beginning of the answer goes: assistant (turn), user (message), none.")]
DEFAULT_TEXTS = ["perplexity", "niah_multikey_2", "niah_multivalue", "vt"]
"""Real text, lines that are all alike, facts to collect, a chain."""
Folders = Annotated[list[Path], typer.Argument(help="Folders that eval run wrote.")]


@eval_app.command("list")
def list_tasks() -> None:
    """List tasks and suites."""
    from longspan.commands.evaluate import list_tasks as run

    run()


@eval_app.command()
def build(
    model: Model, out: Annotated[Path, typer.Option(help="File to write; of lm-eval a folder.")],
    task: TaskNames,
    lengths: Lengths = None, n: Count = 20, seed: Seed = 0, text_root: TextRoots = None,
    words: Words = None, data: Data = None, depths: Depths = 11, questions: Questions = 20,
    distractors: Distractors = 5, template: Template = "chat", prefix: Prefix = "assistant",
    text: Annotated[bool, typer.Option("--text", help="Write the prompts' texts too.")] = False,
    form: Annotated[str, typer.Option(
        "--format", help="recipes, or lm-eval: tasks for its --include_path.")] = "recipes",
) -> None:
    """Write the recipes of prompts (task, length, seed, index, hash), without asking anybody."""
    from longspan.commands.evaluate import build as run
    from longspan.commands.prompts import PromptsJob, make_plan
    from longspan.eval.tasks.registry import TaskOptions

    options = TaskOptions(num_depths=depths, num_questions=questions, num_distractors=distractors)
    run(PromptsJob(
        tokenizer=model, plan=make_plan(task, _lengths(lengths), n, seed, options),
        text_roots=tuple(text_root or ()), words=words, data=data, template=template,
        prefix=prefix), out, text, form)


@eval_app.command()
def run(
    model: Model, task: TaskNames, lengths: Lengths = None, n: Count = 20, seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder of the runs; each setting gets its own.")] =
        Path("out/eval"),
    attention: Annotated[str, typer.Option(
        help="dense, sparse, paper (MInference's policy, same budgets), with commas between.")] =
        "dense",
    positions: Annotated[str, typer.Option(help="auto, or rope, dca, dca+yarn.")] = "auto",
    url: Annotated[str | None, typer.Option(
        help="OpenAI-compatible address, such as http://127.0.0.1:8000/v1; MODEL is the name of "
             "the model there.")] = None,
    tokenizer: Annotated[str | None, typer.Option(
        help="Of the model behind --url: directory, hub id, or nano.")] = None,
    api: Annotated[str, typer.Option(
        help="completions: prompts go as token ids; chat: as messages.")] = "completions",
    api_key: Annotated[str, typer.Option(
        help="For --url.", envvar="LONGSPAN_EVAL_API_KEY", show_envvar=True)] = "none",
    timeout_s: Annotated[float, typer.Option(help="Longest silence of a server.")] = 3600.0,
    concurrency: Annotated[int, typer.Option(
        min=1, help="Documents asked about at a time; above 1 no times are kept.")] = 1,
    time_limit_s: Annotated[float | None, typer.Option(
        help="Begin nothing new after these seconds from the start; run again to go on.")] = None,
    answer_nll: Annotated[bool, typer.Option(
        "--answer-nll", help="Also score the right answers: nats a token of them.")] = False,
    shares_device: Annotated[bool, typer.Option(
        "--shares-device", help="Others compute there meanwhile: keep no times.")] = False,
    label: Annotated[str | None, typer.Option(
        help="Attention as the rows name it, for --url.")] = None,
    name: Annotated[str | None, typer.Option(help="Model's name in the results.")] = None,
    text_root: TextRoots = None, words: Words = None, data: Data = None, depths: Depths = 11,
    questions: Questions = 20, distractors: Distractors = 5, template: Template = "chat",
    prefix: Prefix = "assistant", max_model_len: MaxModelLen = None, device: Device = None,
    dtype: Dtype = None, prefill_chunk_len: ChunkLen = None, sparsity_plan: Plan = None,
    memory_gib: Memory = None, quantization: Quantization = None, threads: Threads = None,
) -> None:
    """Ask a model, in this process or behind an address. Goes on where it was cut off."""
    from longspan.commands.evaluate import Pace
    from longspan.commands.evaluate import run as run_job
    from longspan.commands.models import ModelJob
    from longspan.commands.prompts import PromptsJob, make_plan
    from longspan.eval.endpoint import EndpointConfig
    from longspan.eval.tasks.registry import TaskOptions

    task_options = TaskOptions(num_depths=depths, num_questions=questions,
                               num_distractors=distractors)
    prompts = PromptsJob(
        tokenizer=tokenizer or model,
        plan=replace(make_plan(task, _lengths(lengths), n, seed, task_options),
                     answer_nll=answer_nll),
        text_roots=tuple(text_root or ()), words=words, data=data, template=template,
        # a server that takes messages begins the assistant's turn itself
        prefix="user" if api == "chat" and prefix == "assistant" else prefix)
    endpoint = None if url is None else EndpointConfig(
        url=url, model=model, api=api, api_key=api_key, timeout_s=timeout_s)
    status = run_job(prompts, ModelJob(
        model=model, name=name, endpoint=endpoint, label=label, max_model_len=max_model_len,
        attention=parse_list(attention, str, "--attention"),
        positions=parse_list(positions, str, "--positions"),
        options={"device": device, "dtype": dtype, "prefill_chunk_len": prefill_chunk_len,
                 "sparsity_plan": sparsity_plan, "memory_gib": memory_gib,
                 "quantization": quantization, "num_threads": threads},
        concurrency=concurrency),
        out, Pace(time_limit_s=time_limit_s, shares_device=shares_device))
    if status:
        raise typer.Exit(status)


@eval_app.command()
def fidelity(
    model: Model, task: TaskNames = DEFAULT_TEXTS,
    lengths: Lengths = "32k", n: Count = 2, seed: Seed = 0,
    attention: Annotated[str, typer.Option(
        help="Compared with dense: sparse, paper (MInference's policy), or both.")] = "sparse",
    positions: Annotated[str, typer.Option(help="auto, or rope, dca, dca+yarn.")] = "auto",
    compared_positions: Annotated[int, typer.Option(
        help="Positions of each text whose distributions are compared.")] = 2048,
    every: Annotated[int, typer.Option(
        help="One query tile of so many is attended to densely, for recall.")] = 8,
    kv_dtype: Annotated[str | None, typer.Option(
        help="int8: dense attention over such keys and values is compared too.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of result files.")] = Path("out/fidelity"),
    time_limit_s: Annotated[float | None, typer.Option(
        help="Begin no text after these seconds.")] = None,
    name: Annotated[str | None, typer.Option(help="Model's name in the results.")] = None,
    text_root: TextRoots = None, words: Words = None, data: Data = None,
    template: Template = "chat", max_model_len: MaxModelLen = None, device: Device = None,
    dtype: Dtype = None, prefill_chunk_len: ChunkLen = None, sparsity_plan: Plan = None,
    memory_gib: Memory = None, quantization: Quantization = None, threads: Threads = None,
) -> None:
    """Compare sparse attention with dense: recall, output error, KL, top-1, nats by position."""
    from longspan.commands.console import note
    from longspan.commands.fidelity import FidelityJob
    from longspan.commands.fidelity import run as run_job
    from longspan.commands.models import ModelJob
    from longspan.commands.prompts import PromptsJob, make_plan
    from longspan.eval.tasks.registry import TaskOptions

    prompts = PromptsJob(
        tokenizer=model, plan=make_plan(task, _lengths(lengths), n, seed,
                                        TaskOptions(num_questions=1)),
        text_roots=tuple(text_root or ()), words=words, data=data, template=template,
        prefix="assistant")
    note(str(run_job(FidelityJob(
        prompts=prompts, num_positions=compared_positions, every=every, out=out,
        time_limit_s=time_limit_s, kv_dtype=kv_dtype, model=ModelJob(
            model=model, name=name, max_model_len=max_model_len,
            attention=parse_list(attention, str, "--attention"),
            positions=parse_list(positions, str, "--positions"),
            options={"device": device, "dtype": dtype, "prefill_chunk_len": prefill_chunk_len,
                     "sparsity_plan": sparsity_plan, "memory_gib": memory_gib,
                     "quantization": quantization, "num_threads": threads})))))


@eval_app.command()
def score(
    folders: Folders,
    judge_url: Annotated[str | None, typer.Option(
        help="OpenAI-compatible address of a judge, for LongBench-Chat.")] = None,
    judge: Annotated[str, typer.Option(help="Name of the model there.")] = "judge",
    api_key: Annotated[str, typer.Option(
        help="For --judge-url.", envvar="LONGSPAN_EVAL_API_KEY", show_envvar=True)] = "none",
) -> None:
    """Score stored answers again, rebuild summaries and show them."""
    from longspan.commands.evaluate import score as run
    from longspan.eval.endpoint import EndpointConfig

    run(folders, None if judge_url is None else EndpointConfig(
        url=judge_url, model=judge, api="chat", api_key=api_key))


@eval_app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run, dense for example.")],
    second: Annotated[Path, typer.Argument(help="The run to hold against it.")],
    margin: Annotated[float, typer.Option(
        min=0.0, max=1.0, help="Loss on a task that is still not worse.")] = 0.05,
    out: Annotated[Path | None, typer.Option(help="CSV file to write.")] = None,
) -> None:
    """Compare two runs on the prompts that both answered."""
    from longspan.commands.evaluate import compare as run

    run(first, second, margin, out)


@eval_app.command()
def plot(
    folders: Annotated[list[Path], typer.Argument(
        help="Folders that eval run wrote, files that eval fidelity wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the plots.")] = Path("out/plots"),
) -> None:
    """Draw heat maps, scores by length, further runs against the first, and per-head maps."""
    from longspan.commands.evaluate import plot as run

    run(folders, out)


@eval_app.command()
def export(
    folders: Folders,
    form: Annotated[str, typer.Option(
        "--format", help="results: rows of a result file; csv; ruler: predictions that NVIDIA's "
                         "evaluate.py scores.")] = "results",
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("bench/results"),
) -> None:
    """Write the figures or answers of runs for others to use."""
    from longspan.commands.evaluate import export as run

    run(folders, form, out)


def _lengths(text: str | None) -> tuple[int, ...]:
    return () if text is None else parse_list(text, parse_length, "--lengths")
