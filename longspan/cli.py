"""The command line. Subcommands parse; what they do is elsewhere and imported when they run.

Exit status: 0 done, 1 the command ran and its result is negative or it failed unexpectedly,
2 something a person can mend (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from longspan.commands.bench_cache import bench_cache_app
from longspan.commands.bench_llama_cpp import bench_llama_cpp_app
from longspan.commands.bench_pipeline import bench_pipeline
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
    BudgetS,
    ChunkLen,
    Commit,
    ContextParallel,
    Device,
    Documents,
    Dtype,
    KvDir,
    KvDisk,
    KvDtype,
    KvHost,
    Layers,
    MaxConnections,
    MaxModelLen,
    MaxRequests,
    Memory,
    Model,
    ModelOption,
    PipelineParallel,
    Plan,
    Policy,
    Positions,
    Quantization,
    Recall,
    Results,
    SelectionMode,
    ShapeName,
    Slash,
    Threads,
    Version,
    Vertical,
    Weights,
    parse_list,
)
from longspan.commands.run_app import run_app
from longspan.commands.strict import Commands
from longspan.commands.synth_options import synth_app
from longspan.commands.train_app import train_app

app = Commands(
    help="Read a million tokens: long-context inference, measured.", add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]})
bench_app = Commands(help="Measure speed and memory.", rich_markup_mode=None)
app.add_typer(eval_app, name="eval")
app.add_typer(cache_app, name="cache")
app.add_typer(bench_app, name="bench")
app.add_typer(train_app, name="train")
app.command("import")(import_gguf)
bench_app.add_typer(bench_cache_app)
bench_app.command("pipeline")(bench_pipeline)
bench_app.add_typer(bench_llama_cpp_app)
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
    cp: ContextParallel = 1, pp: PipelineParallel = 1,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    json: Annotated[bool, typer.Option(
        "--json", help="Print each result as one line of JSON.")] = False,
) -> None:
    """Answer questions about documents of up to a million tokens together."""
    from longspan.commands.generate import PromptSource, run

    source = PromptSource(file=prompt_file, documents=tuple(document or ()),
                          questions=tuple(question or ()), raw=raw)
    options = join_ranks(model, {
        "device": device, "dtype": dtype, "attention": attention, "positions": positions,
        "max_model_len": max_model_len, "prefill_chunk_len": prefill_chunk_len,
        "sparsity_plan": sparsity_plan, "recall": recall, "memory_gib": memory_gib,
        "weights": weights, "quantization": quantization, "kv_host_gib": kv_host_gib,
        "kv_dir": kv_dir, "kv_disk_gib": kv_disk_gib, "kv_dtype": kv_dtype,
        "num_threads": threads,
        "context_parallel": cp, "pipeline_parallel": pp}, os.environ)
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
    quantization: Quantization = None,
) -> None:
    """Show what a prompt of some length needs on this machine, and how it would run."""
    from longspan.commands.info import run

    run(model, length, {
        "device": device, "dtype": dtype, "attention": attention, "positions": positions,
        "prefill_chunk_len": prefill_chunk_len, "sparsity_plan": sparsity_plan,
        "memory_gib": memory_gib, "max_num_requests": max_num_requests,
        "kv_host_gib": kv_host_gib, "kv_dir": kv_dir, "kv_disk_gib": kv_disk_gib,
        "kv_dtype": kv_dtype, "quantization": quantization})


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
    cp: ContextParallel = 1, pp: PipelineParallel = 1,
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
    _exit(run(model, config, join_ranks(model, {
        "device": device, "dtype": dtype, "attention": attention, "positions": positions,
        "max_model_len": max_model_len, "prefill_chunk_len": prefill_chunk_len,
        "sparsity_plan": sparsity_plan, "recall": recall, "memory_gib": memory_gib,
        "weights": weights, "quantization": quantization,
        "max_num_requests": max_num_requests, "kv_host_gib": kv_host_gib, "kv_dir": kv_dir,
        "kv_disk_gib": kv_disk_gib, "kv_dtype": kv_dtype,
        "num_threads": threads, "step_budget_s": step_budget_s,
        "context_parallel": cp, "pipeline_parallel": pp}, os.environ)))


@bench_app.command()
def cpu(
    model: ModelOption = "nano",
    lengths: Annotated[str, typer.Option(help="Dense lengths for the fit.")] = "32768,65536",
    demo_length: Annotated[int, typer.Option(help="Sparse against the fit.")] = 131_072,
    transformers_length: Annotated[int, typer.Option(help="Against transformers.")] = 65_536,
    threads: Threads = None, out: Results = Path("bench/results"),
) -> None:
    """Compare sparse and dense prefill with each other and with transformers on this CPU."""
    from longspan.bench.engine.cpu import run

    run(model, lengths=parse_list(lengths, int, "--lengths"), demo_length=demo_length,
        transformers_length=transformers_length, threads=threads, out=out)


@bench_app.command()
def ops(
    shape: ShapeName = "qwen2.5-7b",
    lengths: Annotated[str, typer.Option(help="Context lengths.")] =
        "32768,131072,262144,524288,1048576",
    square: Annotated[str, typer.Option(help="Whole dense prompts in one call.")] = "32768,131072",
    baselines: Annotated[str, typer.Option(help="cudnn, fa2, flex.")] = "cudnn,fa2,flex",
    chunk_baselines: Annotated[str, typer.Option(help="The same, behind histories.")] = "cudnn",
    flex_max: Annotated[int, typer.Option(help="Longest prompt for flex.")] = 32_768,
    chunk_len: Annotated[int, typer.Option(help="Tokens of a prefill chunk.")] = 32_768,
    layers: Annotated[int, typer.Option(help="Layers of whole prefills, evenly spaced.")] = 4,
    only: Annotated[str | None, typer.Option(help="Sections, with commas between.")] = None,
    contents: Annotated[str, typer.Option(help="random, local, scattered.")] =
        "random,local,scattered",
    max_s: Annotated[float, typer.Option(help="Seconds for the repeats of one figure.")] = 1.0,
    vertical: Vertical = None, slash: Slash = None, mode: SelectionMode = "tile",
    policy: Policy = "", device: Device = None,
    commit: Commit = None, budget_s: BudgetS = None, out: Results = Path("bench/results"),
) -> None:
    """Compare attention ops with PyTorch's on one layer of a real shape; checks come first."""
    from longspan.bench.ops.command import run
    from longspan.bench.ops.dense import SECTIONS, OpsOptions
    from longspan.bench.session import BenchOptions, BenchSession
    from longspan.bench.shapes import PlanOptions, Shape
    from longspan.bench.timing import Repeats

    plan = PlanOptions(vertical=vertical, slash=slash, mode=mode, policy=policy)
    options = OpsOptions(
        lengths=parse_list(lengths, int, "--lengths"), square=parse_list(square, int, "--square"),
        baselines=parse_list(baselines, str, "--baselines"), flex_max=flex_max,
        chunk_baselines=parse_list(chunk_baselines, str, "--chunk-baselines"),
        chunk_len=chunk_len, layers=layers, contents=parse_list(contents, str, "--contents"),
        sections=SECTIONS if only is None else parse_list(only, str, "--only"),
        repeats=Repeats(max_s=max_s))
    session = BenchSession("ops", BenchOptions.make(device, out, commit, budget_s))
    _exit(run(session, Shape.make(shape, plan), options))


@bench_app.command()
def ttft(
    shape: ShapeName = "qwen2.5-7b",
    lengths: Annotated[str, typer.Option(help="Prompt tokens.")] = "131072,262144,524288,1000000",
    attention: Annotated[str, typer.Option(help="dense, sparse, or both.")] = "sparse,dense",
    layers: Layers = None, chunk_len: Annotated[
        int | None, typer.Option(help="Tokens of a prefill chunk.")] = None,
    vertical: Vertical = None, slash: Slash = None, mode: SelectionMode = "tile",
    policy: Policy = "", memory_gib: Memory = None, quantization: Quantization = None,
    cp: Annotated[str, typer.Option(help="GPUs that share the prompt: 1, or 1,2.")] = "1",
    device: Device = None, commit: Commit = None, budget_s: BudgetS = None,
    out: Results = Path("bench/results"),
) -> None:
    """Time to the first token of a real shape with random weights, through the engine."""
    from longspan.bench.engine.ttft import TtftOptions, run
    from longspan.bench.session import BenchOptions, BenchSession
    from longspan.bench.shapes import PlanOptions, Shape

    plan = PlanOptions(vertical=vertical, slash=slash, mode=mode, policy=policy)
    options = TtftOptions(
        lengths=parse_list(lengths, int, "--lengths"), layers=layers, chunk_len=chunk_len,
        attention=parse_list(attention, str, "--attention"), memory_gib=memory_gib,
        quantization=quantization, ranks=parse_list(cp, int, "--cp"))
    session = BenchSession("ttft", BenchOptions.make(device, out, commit, budget_s))
    _exit(run(session, Shape.make(shape, plan), options))


@bench_app.command()
def decode(
    shape: ShapeName = "qwen2.5-7b",
    contexts: Annotated[str, typer.Option(help="Tokens of each request.")] = "1000,131072,1000000",
    batch: Annotated[str, typer.Option(help="Requests decoded together.")] = "1,16,64",
    rows: Annotated[str, typer.Option(
        help="Last tokens of one sequence, attended together.")] = "1,2,4,8,16",
    kv_dtype: KvDtype = None, layers: Layers = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps timed.")] = 50,
    memory_gib: Memory = None, quantization: Quantization = None,
    device: Device = None, commit: Commit = None,
    budget_s: BudgetS = None, out: Results = Path("bench/results"),
) -> None:
    """Time of a decode step of a real shape behind long contexts, against its bytes."""
    from longspan.bench.engine.decode import DecodeOptions, run
    from longspan.bench.session import BenchOptions, BenchSession
    from longspan.bench.shapes import Shape

    options = DecodeOptions(
        contexts=parse_list(contexts, int, "--contexts"), steps=steps, layers=layers,
        batches=parse_list(batch, int, "--batch"), rows=parse_list(rows, int, "--rows"),
        memory_gib=memory_gib, quantization=quantization, kv_dtype=kv_dtype)
    session = BenchSession("decode", BenchOptions.make(device, out, commit, budget_s))
    _exit(run(session, Shape.make(shape), options))


@bench_app.command()
def quality(
    model: ModelOption = "nano",
    lengths: Annotated[str, typer.Option(help="Prompt tokens.")] = "131072,524288,1000000",
    attention: Annotated[str, typer.Option(help="dense, tile, paper.")] = "dense,tile,paper",
    single: Annotated[int, typer.Option(min=1, help="Prompts with one question.")] = 8,
    many: Annotated[int, typer.Option(min=1, help="Questions of the other prompt.")] = 32,
    seed: Annotated[int, typer.Option(help="Same seed, same prompts.")] = 0,
    text_root: Annotated[list[Path] | None,
                         typer.Option(help="Folder of texts; default: Python's library.")] = None,
    chunk_len: Annotated[int | None, typer.Option(help="Tokens of a prefill chunk.")] = None,
    policy: Annotated[list[str] | None, typer.Option(
        help="Another tile setting: num_scouts=128,tail_len=0, …; repeatable.")] = None,
    plan: Annotated[list[Path] | None, typer.Option(
        help="Another plan's file; repeatable.")] = None,
    oracle: Annotated[str, typer.Option(
        help="Shares of the key tiles that an oracle keeps: 0.01,0.05.")] = "",
    places: Annotated[str, typer.Option(
        help="Kinds of prompts.")] = "one,end,spread,negatives,far",
    heads: Annotated[bool, typer.Option(
        help="Measure recall by head; without it times are measured.")] = True,
    memory_gib: Memory = None,
    device: Device = None, commit: Commit = None, budget_s: BudgetS = None,
    out: Results = Path("bench/results"),
) -> None:
    """Measure what sparse prefill answers and keeps of attention, beside dense, at equal cost."""
    from longspan.bench.engine.quality import QualityOptions, run
    from longspan.bench.session import BenchOptions, BenchSession

    options = QualityOptions(
        model=model, lengths=parse_list(lengths, int, "--lengths"), num_single=single,
        settings=parse_list(attention, str, "--attention"), num_many=many, seed=seed,
        text_roots=tuple(text_root or ()), chunk_len=chunk_len, policies=tuple(policy or ()),
        plans=tuple(plan or ()), oracles=parse_list(oracle, float, "--oracle") if oracle else (),
        places=parse_list(places, str, "--places"), with_heads=heads, memory_gib=memory_gib)
    session = BenchSession("quality", BenchOptions.make(device, out, commit, budget_s))
    _exit(run(session, options))


@bench_app.command("serve")
def bench_serve(
    model: ModelOption = "nano",
    scenario: Annotated[str, typer.Option(
        help="prefill, followup, decode, crowd, with commas between.")] = "prefill,followup,decode",
    length: Annotated[int, typer.Option(min=256, help="Long prompt, tokens.")] = 131_072,
    budget_s: Annotated[float | None, typer.Option(
        help="Of a step; default: the server's.")] = None,
    batches: Annotated[str, typer.Option(help="Requests that decode together.")] = "1,16,64",
    soak: Annotated[float, typer.Option(
        help="Seconds of mixed requests and hang-ups instead; fails if anything leaks.")] = 0.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    weights: Weights = "checkpoint", threads: Threads = None, commit: Commit = None,
    out: Results = Path("bench/results"),
) -> None:
    """Measure what users of a real server feel while a long prompt is read."""
    from longspan.bench.server.serve import ServeJob, run

    is_sound = run(ServeJob(
        model=model, scenarios=parse_list(scenario, str, "--scenario"), length=length,
        budget_s=budget_s, batches=parse_list(batches, int, "--batches"), soak_s=soak,
        device=device, weights=weights, threads=threads, commit=commit, out=out))
    _exit(int(not is_sound))


def _exit(status: int) -> None:
    """End a command with a status other than 0."""
    if status:
        raise typer.Exit(status)


def run_command(arguments: Sequence[str]) -> int:
    """Run one of longspan's commands; returns its exit status."""
    return run_app(app, arguments, "longspan")


def main() -> None:
    """Entry point of the ``longspan`` command."""
    sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
