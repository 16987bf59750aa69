"""What ``longspan synth`` takes on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from longspan.errors import LongspanError

Number = TypeVar("Number", int, float)

app = typer.Typer(rich_markup_mode=None)


@app.command()
def synth(
    sources: Annotated[list[str], typer.Argument(
        help="Folders, text, JSONL or Parquet files, datasets:NAME.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, or a directory with one.")],
    out: Annotated[Path, typer.Option(help="New folder; or that of a run that was cut.")],
    rows: Annotated[list[str], typer.Option(
        metavar="LENGTH=ROWS", help="Training rows of a length, tokens; repeatable.")],
    task: Annotated[list[str] | None, typer.Option(
        metavar="NAME=WEIGHT", help="Only these tasks, with their shares; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same rows.")] = 0,
    column: Annotated[str, typer.Option(help="Where records have their text.")] = "text",
    split: Annotated[str, typer.Option(help="Of a data set of the hub.")] = "train",
    include: Annotated[list[str] | None, typer.Option(
        help="Only files like *.py; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(
        help="No files like */tests/*; repeatable.")] = None,
    join_depth: Annotated[int | None, typer.Option(
        min=0, help="Files with so many folders in common are one document.")] = None,
    join_short: Annotated[bool, typer.Option(
        "--join-short", help="Tasks may read short documents as one.")] = False,
    min_chars: Annotated[int, typer.Option(min=1, help="Shortest text.")] = 200,
    max_chars: Annotated[int | None, typer.Option(min=1, help="Longest text.")] = None,
    max_markup: Annotated[float, typer.Option(
        min=0, max=1, help="Share of characters in tags.")] = 0.3,
    compressed: Annotated[str, typer.Option(
        metavar="LOW:HIGH", help="Size after zlib; below: repetition, above: noise.")] =
        "0.04:0.75",
    near_duplicate: Annotated[float, typer.Option(
        min=0, max=1, help="Share in common with an earlier text; 1: only exact ones go.")] = 0.8,
    held_out: Annotated[float, typer.Option(
        min=0, max=0.5, help="Share of documents and rows that is set aside.")] = 0.02,
    answer_weight: Annotated[float, typer.Option(min=0, help="Loss weight of answers.")] = 5.0,
    copy_weight: Annotated[float, typer.Option(min=0, help="Of text that repeats text.")] = 2.0,
    packed: Annotated[float, typer.Option(
        min=0, max=1, help="Share of rows up to 4,096 tokens with many short samples.")] = 0.2,
    licence: Annotated[str, typer.Option(help="Of the texts, for the card.")] = "not stated",
    workers: Annotated[int | None, typer.Option(
        min=1, help="Processes; default: all cores but one.")] = None,
) -> None:
    """Make training rows for long contexts of any text, for any tokenizer and any trainer."""
    from longspan.commands import synth as body
    from longspan.data.documents import Reading, Root
    from longspan.data.filters import Filters
    from longspan.data.rows import WEIGHTS, Mixture
    from longspan.data.shards import RowPlanner

    low, high = parse_range("--compressed", compressed)
    weights = parse_pairs("--task", task, str, float) if task else WEIGHTS
    body.run(body.SynthJob(
        roots=[Root(path=source) for source in sources],
        reading=Reading(include=tuple(include or "*"), exclude=tuple(exclude or ()), column=column,
                        split=split, join_depth=join_depth),
        filters=Filters(
            min_chars=min_chars, max_chars=max_chars, max_markup=max_markup, min_compressed=low,
            max_compressed=high, near_duplicate=near_duplicate if near_duplicate < 1 else None),
        tokenizer=tokenizer, out=out, may_join=join_short, licence=licence,
        num_workers=workers or body.default_workers(),
        planner=RowPlanner(
            num_rows=parse_pairs("--rows", rows, int, int), seed=seed, held_out=held_out,
            mixture=Mixture(weights=weights, packed=packed), answer_weight=answer_weight,
            copy_weight=copy_weight)))


Key = TypeVar("Key", int, str)


def parse_pairs(
    option: str, texts: Sequence[str], key: Callable[[str], Key],
    number: Callable[[str], Number],
) -> Mapping[Key, Number]:
    """``KEY=NUMBER`` each, numbers positive. Raises `LongspanError` for anything else."""
    found: dict[Key, Number] = {}
    for text in texts:
        name, _, amount = text.partition("=")
        try:
            pair = key(name.replace("_", "") if key is int else name), number(amount)
        except ValueError:
            pair = None
        if not name or pair is None or not pair[1] > 0 or pair[0] in found:
            raise LongspanError(f"{option} {text}: write NAME=NUMBER, each name once, the number "
                                "positive")
        found[pair[0]] = pair[1]
    return found


def parse_range(option: str, text: str) -> tuple[float, float]:
    """``LOW:HIGH``. Raises `LongspanError` for anything else."""
    low, _, high = text.partition(":")
    try:
        found = float(low), float(high)
    except ValueError:
        found = 1.0, 0.0
    if not 0 <= found[0] < found[1]:
        raise LongspanError(f"{option} {text}: write LOW:HIGH, two numbers, the first less")
    return found
