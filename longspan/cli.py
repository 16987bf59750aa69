"""The command line. Subcommands parse; what they do is elsewhere and imported when they run.

Exit status: 0 done, 1 the command ran and its result is negative or it failed unexpectedly,
2 something a person can mend (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from longspan.commands.bench_app import bench_app
from longspan.commands.cache_app import cache_app
from longspan.commands.calibrate_app import calibrate_app
from longspan.commands.eval_app import eval_app
from longspan.commands.import_gguf import import_gguf
from longspan.commands.join_ranks import join_ranks
from longspan.commands.options import (
    AccessLog,
    AllowedHosts,
    AllowedOrigins,
    Attention,
    ChunkLen,
    ContextParallel,
    Device,
    Documents,
    Dtype,
    KvDir,
    KvDisk,
    KvDtype,
    KvHost,
    MaxConnections,
    MaxModelLen,
    MaxRequests,
    Memory,
    Model,
    ModelOption,
    PipelineParallel,
    Plan,
    Positions,
    Quantization,
    Recall,
    TensorParallel,
    Threads,
    Version,
    Weights,
)
from longspan.commands.run_app import end_with, leave, run_app
from longspan.commands.strict import Commands
from longspan.commands.synth_options import synth_app
from longspan.commands.train_app import train_app

app = Commands(
    help="Read a million tokens: long-context inference, measured.", add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(eval_app, name="eval")
app.add_typer(cache_app, name="cache")
app.add_typer(bench_app, name="bench")
app.add_typer(train_app, name="train")
app.command("import")(import_gguf)
app.add_typer(calibrate_app)
app.add_typer(synth_app, name="synth")


@app.callback()
def root(version: Version = False) -> None:
    """Read a million tokens: long-context inference, measured."""


@app.command()
def generate(
    model: Model,
    document: Documents = None,
    question: Annotated[list[str] | None, typer.Option(
        metavar="TEXT", help="Asked about the documents, or after the prompt; repeatable. Without "
                             "one they are read from standard input.")] = None,
    prompt_file: Annotated[str | None, typer.Option(
        help="UTF-8 text that is the prompt as it stands; - is standard input.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 256,
    temperature: Annotated[float | None, typer.Option(
        help="0: the most probable token. These five: default by the checkpoint.")] = None,
    top_k: Annotated[int | None, typer.Option(
        help="Keep the k most probable tokens; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(
        help="Keep tokens up to this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(
        help="Least share of the top probability.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(
        help="Above 1: tokens seen before become less probable.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats a sampled answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(
        metavar="TEXT", help="Ends the answer; repeatable.")] = None,
    device: Device = None, dtype: Dtype = None, attention: Attention = "auto",
    positions: Positions = "auto", max_model_len: MaxModelLen = None,
    prefill_chunk_len: ChunkLen = None, sparsity_plan: Plan = None, recall: Recall = None,
    memory_gib: Memory = None, kv_host_gib: KvHost = 0.0, kv_dir: KvDir = None,
    kv_disk_gib: KvDisk = None, kv_dtype: KvDtype = None, weights: Weights = "checkpoint",
    quantization: Quantization = None, threads: Threads = None,
    cp: ContextParallel = 1, pp: PipelineParallel = 1, tp: TensorParallel = 1,
    sources: Annotated[bool, typer.Option(
        "--sources", help="Show where in the documents each answer stands.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    json: Annotated[bool, typer.Option(
        "--json", help="Print each result as one line of JSON.")] = False,
) -> None:
    """Answer questions about documents of up to a million tokens together."""
    from longspan.commands.generate import PromptSource, run

    source = PromptSource(file=prompt_file, documents=tuple(document or ()),
                          questions=tuple(question or ()), raw=raw, shows_sources=sources)
    options = join_ranks(model, {
        "device": device, "dtype": dtype, "attention": attention, "positions": positions,
        "max_model_len": max_model_len, "prefill_chunk_len": prefill_chunk_len,
        "sparsity_plan": sparsity_plan, "recall": recall, "memory_gib": memory_gib,
        "weights": weights, "quantization": quantization, "kv_host_gib": kv_host_gib,
        "kv_dir": kv_dir, "kv_disk_gib": kv_disk_gib, "kv_dtype": kv_dtype,
        "num_threads": threads,
        "context_parallel": cp, "pipeline_parallel": pp, "tensor_parallel": tp}, os.environ)
    run(model, source, {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": seed,
        "stop": tuple(stop or ())}, json, options)


@app.command()
def info(
    model: Model,
    length: Annotated[int | None, typer.Option(help="Prompt tokens; default: the claim.")] = None,
    device: Device = None, dtype: Dtype = None, attention: Attention = "auto",
    positions: Positions = "auto", prefill_chunk_len: ChunkLen = None, sparsity_plan: Plan = None,
    memory_gib: Memory = None, max_num_requests: MaxRequests = None, kv_host_gib: KvHost = 0.0,
    kv_dir: KvDir = None, kv_disk_gib: KvDisk = None, kv_dtype: KvDtype = None,
    quantization: Quantization = None, cp: ContextParallel = 1, pp: PipelineParallel = 1,
    tp: TensorParallel = 1,
) -> None:
    """Show what a prompt of some length needs on this machine, and how it would run."""
    from longspan.commands.info import run

    run(model, length, {
        "device": device, "dtype": dtype, "attention": attention, "positions": positions,
        "prefill_chunk_len": prefill_chunk_len, "sparsity_plan": sparsity_plan,
        "memory_gib": memory_gib, "max_num_requests": max_num_requests,
        "kv_host_gib": kv_host_gib, "kv_dir": kv_dir, "kv_disk_gib": kv_disk_gib,
        "kv_dtype": kv_dtype, "quantization": quantization, "context_parallel": cp,
        "pipeline_parallel": pp, "tensor_parallel": tp})


@app.command()
def demo(
    length: Annotated[int | None, typer.Option(
        help="Prompt tokens; default: 131,072, or as long as the documents are.")] = None,
    document: Documents = None,
    seed: Annotated[int | None, typer.Option(help="Repeats a run; default: a new one.")] = None,
    num_facts: Annotated[int, typer.Option(min=1, max=100, help="Numbers to hide.")] = 5,
    model: ModelOption = "nano", device: Device = None, attention: Attention = "auto",
    positions: Positions = "auto", prefill_chunk_len: ChunkLen = None, threads: Threads = None,
) -> None:
    """Hide numbers in a long text of this machine and ask for each of them."""
    from longspan.commands.demo import run

    is_right = run(model, length, seed, num_facts, tuple(document or ()), {
        "device": device, "attention": attention, "positions": positions,
        "prefill_chunk_len": prefill_chunk_len, "num_threads": threads})
    if not is_right:
        raise typer.Exit(1)


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 8000,
    api_key: Annotated[list[str] | None, typer.Option(
        help="Wanted of every client; repeatable.", envvar="LONGSPAN_API_KEY")] = None,
    allowed_host: AllowedHosts = None, allowed_origin: AllowedOrigins = None,
    model_name: Annotated[str | None, typer.Option(help="Name that clients ask for.")] = None,
    default_max_tokens: Annotated[int, typer.Option(help="Where a request names none.")] = 2048,
    max_queued_tokens: Annotated[int | None, typer.Option(
        help="Prompt tokens that may wait; then 429.")] = None,
    drain_timeout_s: Annotated[float, typer.Option(help="Longest wait after SIGTERM.")] = 600.0,
    max_connections: MaxConnections = 4096,
    step_budget_s: Annotated[float | None, typer.Option(
        help="Longest pause of running answers; default: 1 on CPUs, 0.1 on GPUs.")] = None,
    access_log: AccessLog = False, device: Device = None, dtype: Dtype = None,
    attention: Attention = "auto", positions: Positions = "auto", max_model_len: MaxModelLen = None,
    prefill_chunk_len: ChunkLen = None, sparsity_plan: Plan = None, recall: Recall = None,
    memory_gib: Memory = None,
    max_num_requests: MaxRequests = None, kv_host_gib: KvHost = 0.0, kv_dir: KvDir = None,
    kv_disk_gib: KvDisk = None, kv_dtype: KvDtype = None, weights: Weights = "checkpoint",
    quantization: Quantization = None, threads: Threads = None,
    cp: ContextParallel = 1, pp: PipelineParallel = 1, tp: TensorParallel = 1,
) -> None:
    """Serve a model over HTTP, as OpenAI's API does, with a page to try it."""
    from longspan.serve import check_dependencies

    check_dependencies()
    from longspan.serve.command import serve as run
    from longspan.serve.config import ServeConfig

    config = ServeConfig(
        host=host, port=port, api_keys=tuple(api_key or ()), model_name=model_name,
        allowed_hosts=tuple(allowed_host or ()), allowed_origins=tuple(allowed_origin or ()),
        default_max_tokens=default_max_tokens, max_queued_tokens=max_queued_tokens,
        drain_timeout_s=drain_timeout_s, max_connections=max_connections, access_log=access_log)
    end_with(run(model, config, join_ranks(model, {
        "device": device, "dtype": dtype, "attention": attention, "positions": positions,
        "max_model_len": max_model_len, "prefill_chunk_len": prefill_chunk_len,
        "sparsity_plan": sparsity_plan, "recall": recall, "memory_gib": memory_gib,
        "weights": weights, "quantization": quantization,
        "max_num_requests": max_num_requests, "kv_host_gib": kv_host_gib, "kv_dir": kv_dir,
        "kv_disk_gib": kv_disk_gib, "kv_dtype": kv_dtype,
        "num_threads": threads, "step_budget_s": step_budget_s,
        "context_parallel": cp, "pipeline_parallel": pp, "tensor_parallel": tp}, os.environ)))


def run_command(arguments: Sequence[str]) -> int:
    """Run one of longspan's commands; returns its exit status."""
    return run_app(app, arguments, "longspan")


def main() -> None:
    """Entry point of the ``longspan`` command."""
    leave(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
