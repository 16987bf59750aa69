"""Options that several subcommands share, and how lists of them are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from longspan.errors import LongspanError
from longspan.version import __version__

Item = TypeVar("Item")
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16; default by device.")]
Quantization = Annotated[str | None, typer.Option(
    help="fp8, int4, int8 (CPUs) or none: quantise weights while loading; default: as the "
         "checkpoint has them, but large models on CPUs in int8.")]
ChunkLen = Annotated[int | None, typer.Option(
    help="Prompt tokens computed in one step; default: by the memory.")]
MaxRequests = Annotated[int | None, typer.Option(
    "--max-num-requests", help="Requests computed together; default: by the memory, up to 64.")]
Plan = Annotated[str | None, typer.Option(help="JSON file of sparsity budgets.")]
Recall = Annotated[float | None, typer.Option(
    help="Attention mass that sparse prefill should keep, such as 0.95; default: the plan's "
         "budgets as they are.")]
Memory = Annotated[float | None, typer.Option(help="Memory to use at the most, GiB.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")]
KvDtype = Annotated[str | None, typer.Option(
    help="Keys and values: int8, bfloat16 or float32; default: as computed, bfloat16 on CPUs "
         "beside quantised weights.")]
KvHost = Annotated[float, typer.Option(help="Host memory for KV without room in the cache, GiB.")]
KvDir = Annotated[str | None, typer.Option(help="Directory that keeps KV across restarts.")]
KvDisk = Annotated[float | None, typer.Option(
    help="Most that it may take, GiB; default: half of what is free there.")]
ContextParallel = Annotated[int, typer.Option(
    "--cp", help="GPUs of this machine that share each prompt; processes on CPUs.")]
PipelineParallel = Annotated[int, typer.Option(
    "--pp", help="GPUs of this machine that share the layers; processes on CPUs.")]
TensorParallel = Annotated[int, typer.Option(
    "--tp", help="GPUs of this machine that share heads and matrices; processes on CPUs.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt and answer, tokens.")]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"longspan {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option(
    "--version", help="Show the version and end.", is_eager=True, callback=_show_version)]
Model = Annotated[str, typer.Argument(help="Directory, hub id, or nano (bundled).")]
Documents = Annotated[list[str] | None, typer.Option(
    "--document", metavar="PATH", help="File or folder to read: text, code, HTML, PDF, "
                                       "Word; repeatable, - is standard input.")]
Results = Annotated[Path, typer.Option(help="Folder of result files.")]
Attention = Annotated[str, typer.Option(help="Prefill: auto, dense or sparse.")]
Positions = Annotated[str, typer.Option(
    help="auto, rope, dca or dca+yarn; the last two also for checkpoints that have no DCA.")]
Weights = Annotated[str, typer.Option(
    help="checkpoint, or random: the same sizes and no weights read, to measure with.")]
ModelOption = Annotated[str, typer.Option(help="Directory, hub id, or nano (bundled).")]
ShapeName = Annotated[str, typer.Option(
    "--shape", help="qwen2.5-7b, qwen2.5-14b, qwen3-30b-a3b or nano; random weights.")]
Vertical = Annotated[int | None, typer.Option(help="Columns of each head; default: released.")]
Slash = Annotated[int | None, typer.Option(help="Diagonals of each head; default: released.")]
SelectionMode = Annotated[str, typer.Option("--mode", help="Selection: tile or paper.")]
Policy = Annotated[str, typer.Option(
    help="Changes to the plan: num_scouts=128,tail_len=0,budget_share=0.5, …")]
Layers = Annotated[int | None, typer.Option(help="Only the first layers; default: all.")]
Commit = Annotated[str | None, typer.Option(help="Where the source is a copy without git.")]
BudgetS = Annotated[float | None, typer.Option(help="Start nothing new after these seconds.")]
UNITS = {"k": 2**10, "m": 2**20}
AllowedHosts = Annotated[list[str] | None, typer.Option(
    help="Name by which clients may call this server, beside localhost; repeatable.")]
AllowedOrigins = Annotated[list[str] | None, typer.Option(
    help="Origin of pages elsewhere that may use this server, https://app.example.org; * for all; "
         "repeatable.")]
MaxConnections = Annotated[int, typer.Option(
    help="Open connections; beyond, idle ones are closed.")]
AccessLog = Annotated[bool, typer.Option("--access-log", help="Log a line for each request.")]



def parse_list(text: str, convert: Callable[[str], Item], option: str) -> tuple[Item, ...]:
    """Split a list at its commas; raises `LongspanError` for what is none. Numbers are counts and
    lengths: positive."""
    items = []
    for part in text.split(","):
        try:
            items.append(convert(part.strip().replace("_", "") if convert is int else part.strip()))
        except ValueError:
            raise LongspanError(f"{option}: {part.strip()!r} is not a number") from None
    if not all(items) or any(isinstance(item, int) and item < 0 for item in items):
        raise LongspanError(f"{option}: {text!r} has an item that is empty or not positive")
    return tuple(items)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Split a list of seeds at its commas; raises `LongspanError` for what is none."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise LongspanError(f"--seeds: {text!r} is no list of whole numbers, as 0,1,2") from None


def parse_length(text: str) -> int:
    """Tokens: ``4096``, ``4k`` or ``1m``. Raises `ValueError` for anything else."""
    number, unit = text.lower(), 1
    if number[-1:] in UNITS:
        number, unit = number[:-1], UNITS[number[-1]]
    return int(number.replace("_", "")) * unit
