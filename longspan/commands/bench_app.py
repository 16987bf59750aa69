"""Commands of ``longspan bench``: what they do is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspan.commands.bench_cache import bench_cache_app
from longspan.commands.bench_documents import bench_documents_app
from longspan.commands.bench_llama_cpp import bench_llama_cpp_app
from longspan.commands.bench_pipeline import bench_pipeline_app
from longspan.commands.options import (
    BudgetS,
    Commit,
    Device,
    Dtype,
    KvDtype,
    Layers,
    Memory,
    ModelOption,
    Policy,
    Quantization,
    Results,
    SelectionMode,
    ShapeName,
    Slash,
    Threads,
    Vertical,
    Weights,
    parse_list,
    parse_seeds,
)
from longspan.commands.run_app import end_with
from longspan.commands.strict import Commands

bench_app = Commands(help="Measure speed and memory.", rich_markup_mode=None)
bench_app.add_typer(bench_cache_app)
bench_app.add_typer(bench_pipeline_app)
bench_app.add_typer(bench_llama_cpp_app)
bench_app.add_typer(bench_documents_app)


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
    end_with(run(session, Shape.make(shape, plan), options))


@bench_app.command()
def ttft(
    shape: ShapeName = "qwen2.5-7b",
    lengths: Annotated[str, typer.Option(help="Prompt tokens.")] = "131072,262144,524288,1000000",
    attention: Annotated[str, typer.Option(help="dense, sparse, or both.")] = "sparse,dense",
    layers: Layers = None, chunk_len: Annotated[
        int | None, typer.Option(help="Tokens of a prefill chunk.")] = None,
    vertical: Vertical = None, slash: Slash = None, mode: SelectionMode = "tile",
    policy: Policy = "", memory_gib: Memory = None, quantization: Quantization = None,
    kv_dtype: KvDtype = None,
    cp: Annotated[str, typer.Option(help="GPUs that share the prompt: 1, or 1,2.")] = "1",
    runs: Annotated[int, typer.Option(min=1, help="Prefills timed in the same engine.")] = 1,
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
        quantization=quantization, kv_dtype=kv_dtype, runs=runs,
        ranks=parse_list(cp, int, "--cp"))
    session = BenchSession("ttft", BenchOptions.make(device, out, commit, budget_s))
    end_with(run(session, Shape.make(shape, plan), options))


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
    end_with(run(session, Shape.make(shape), options))


@bench_app.command()
def quality(
    model: ModelOption = "nano",
    lengths: Annotated[str, typer.Option(help="Prompt tokens.")] = "131072,524288,1000000",
    attention: Annotated[str, typer.Option(help="dense, tile, paper.")] = "dense,tile,paper",
    single: Annotated[int, typer.Option(min=1, help="Prompts with one question.")] = 8,
    many: Annotated[int, typer.Option(min=1, help="Questions of the other prompt.")] = 32,
    seeds: Annotated[str, typer.Option(help="Same seed, same prompts: 0,1,2.")] = "0",
    text_root: Annotated[list[Path] | None,
                         typer.Option(help="Folder of texts; default: Python's library.")] = None,
    chunk_len: Annotated[int | None, typer.Option(help="Tokens of a prefill chunk.")] = None,
    policy: Annotated[list[str] | None, typer.Option(
        help="Another tile setting: num_scouts=128,tail_len=0, …; repeatable.")] = None,
    plan: Annotated[list[Path] | None, typer.Option(
        help="Another plan's file; repeatable.")] = None,
    oracle: Annotated[str, typer.Option(
        help="Shares of the key tiles that an oracle keeps: 0.01,0.05.")] = "",
    quantization: Annotated[str, typer.Option(
        help="Weights beside plain ones: fp8,int4,int8.")] = "",
    kv_dtype: Annotated[str, typer.Option(
        help="KV caches beside plain ones: int8, and bfloat16 on CPUs.")] = "",
    places: Annotated[str, typer.Option(
        help="Kinds of prompts.")] = "one,end,spread,negatives,far",
    heads: Annotated[bool, typer.Option(
        help="Measure recall by head; without it times are measured.")] = True,
    resume: Annotated[bool, typer.Option(
        "--resume", help="Keep the rows that are there; measure what is missing.")] = False,
    memory_gib: Memory = None, dtype: Dtype = None, threads: Threads = None,
    device: Device = None, commit: Commit = None, budget_s: BudgetS = None,
    out: Results = Path("bench/results"),
) -> None:
    """Measure what sparse prefill answers and keeps of attention, beside dense, at equal cost."""
    from longspan.bench.engine.quality import QualityOptions, run
    from longspan.bench.session import BenchOptions, BenchSession

    options = QualityOptions(
        model=model, lengths=parse_list(lengths, int, "--lengths"), num_single=single,
        settings=parse_list(attention, str, "--attention"), num_many=many,
        seeds=parse_seeds(seeds), dtype=dtype, threads=threads,
        text_roots=tuple(text_root or ()), chunk_len=chunk_len, policies=tuple(policy or ()),
        plans=tuple(plan or ()), oracles=parse_list(oracle, float, "--oracle") if oracle else (),
        quantizations=parse_list(quantization, str, "--quantization") if quantization else (),
        kv_dtypes=parse_list(kv_dtype, str, "--kv-dtype") if kv_dtype else (),
        places=parse_list(places, str, "--places"), with_heads=heads, memory_gib=memory_gib)
    session = BenchSession(
        "quality", BenchOptions.make(device, out, commit, budget_s, resume=resume))
    end_with(run(session, options))


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
    end_with(int(not is_sound))
