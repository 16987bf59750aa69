"""`longspan calibrate` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspan.commands.options import ChunkLen, Device, Dtype, Memory, Model, Threads, parse_length
from longspan.errors import LongspanError

calibrate_app = typer.Typer()


@calibrate_app.command()
def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="The plan's file, JSON.")],
    length: Annotated[str, typer.Option(help="Tokens of each text: 131072, 128k, 1m.")] = "128k",
    recall: Annotated[float, typer.Option(
        help="Share of attention mass that each head should keep.")] = 0.9,
    texts: Annotated[int, typer.Option(help="How many texts.")] = 1,
    text_root: Annotated[list[Path] | None, typer.Option(
        help="Folder of texts; repeatable; default: Python's library.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same texts.")] = 0,
    device: Device = None, dtype: Dtype = None, prefill_chunk_len: ChunkLen = None,
    memory_gib: Memory = None, threads: Threads = None,
) -> None:
    """Measure on long texts how much sparse prefill must keep in each head; resumes if stopped."""
    from longspan.commands.calibrate import CalibrateJob, run

    try:
        num_tokens = parse_length(length)
    except ValueError:
        raise LongspanError(f"--length: {length!r} is no number of tokens, such as 128k") from None
    run(CalibrateJob(model=model, out=out, length=num_tokens, recall=recall, num_texts=texts,
                     seed=seed, text_roots=tuple(text_root or ())), {
        "device": device, "dtype": dtype, "prefill_chunk_len": prefill_chunk_len,
        "memory_gib": memory_gib, "num_threads": threads})
