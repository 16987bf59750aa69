"""The commands of a training recipe: raw text to corpus, training, export, result file.

This file joins two halves that never import each other: ``longspan.data`` makes the rows,
``longspan.train`` is the loop.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from longspan.commands.run_app import run_app
from longspan.commands.strict import Commands
from longspan.data.corpus import (
    choose_held_out,
    lower_words,
    most_frequent,
    sample_texts,
    write_corpus,
)
from longspan.data.documents import Reader, Reading, Root
from longspan.data.filters import Filters, Refusal
from longspan.data.gate_documents import gate_documents
from longspan.data.intake import Intake
from longspan.data.rows import Mixture, compose_batch
from longspan.data.source import load_source
from longspan.data.templates import template_texts
from longspan.errors import LongspanError
from longspan.train.export import export_model, join_shards
from longspan.train.gate import Haystack, run_gate
from longspan.train.loader import ComposedFeed, RowMaker
from longspan.train.loop import RunConfig, run_phases
from longspan.train.phases import with_tokens
from longspan.train.recipe import Recipe
from longspan.train.report import write_results
from longspan.train.state import load_weights
from longspan.train.tokenizer import save_tokenizer, train_tokenizer

M = 1_000_000
SHARD_SIZE = "14MB"
"""Shards of a run travel as small files."""

Data = Annotated[Path, typer.Option(help="Folder that `corpus` wrote.")]
Out = Annotated[Path, typer.Option(help="Folder of the run: its log and state.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """What was asked for on the command line."""

    data: Path
    out: Path
    num_tokens: Mapping[str, int]
    """Tokens of phases, by name, in place of the recipe's."""
    resume: bool
    eager: bool
    recompute: bool
    deadline_s: float
    num_workers: int
    shards: Path | None
    """Export there when the run ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRules:
    """How a recipe reads text and what rows it makes of it."""

    reading: Reading = Reading()
    filters: Filters = Filters()
    mixture: Mixture = Mixture()
    held_out: float = 0.02


def make_corpus(
    recipe: Recipe, rules: DataRules, roots: Sequence[Root], out: Path
) -> dict[str, Any]:
    """Read text, train the tokenizer on a sample and on templates, write the corpus; its counts."""
    intake = Intake()
    documents = list(Reader(rules.reading, Refusal(rules.filters), intake).read(roots))
    if not documents:
        raise LongspanError(f"no text that can be used: {intake.left_out()}")
    is_held_out = choose_held_out(
        [d.name for d in documents], [len(d.text) for d in documents], rules.held_out)
    seen = [d for d, out in zip(documents, is_held_out, strict=True) if not out]
    words = Counter(word for document in seen for word in lower_words(document.text))
    texts = [*sample_texts(seen), *template_texts(most_frequent(words))]
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    save_tokenizer(tokenizer, out / "tokenizer")
    return write_corpus(documents, tokenizer, out / "corpus", intake, rules.held_out)


def train(recipe: Recipe, rules: DataRules, options: TrainOptions) -> None:
    """Run or resume the phases; SIGTERM saves and ends."""
    phases = with_tokens(recipe.phases, options.num_tokens)
    config = run_config(recipe, options)
    model = recipe.new_model(vocab_size=recipe.vocab_size)
    feed = ComposedFeed(
        open_rows=partial(open_rows, options.data, rules.mixture),
        kind_weights=recipe.kind_weights, num_workers=options.num_workers, inputs={
            "data": options.data / "corpus",
            "tokenizer": options.data / "tokenizer" / "tokenizer.json"})
    gate = partial(run_gate, partial(haystacks, recipe, options.data), recipe.gate_lengths)
    with stopped_by_sigterm() as stop:
        progress = run_phases(model, phases, feed, config, gate, stop)
    print(f"ended at {progress}", flush=True)
    if options.shards:
        phase = progress.trained(phases)
        export_model(
            model, options.data / "tokenizer", options.shards, rope_theta=phase.rope_theta,
            trained_len=phase.seq_len, max_shard_size=SHARD_SIZE)


def run_config(recipe: Recipe, options: TrainOptions) -> RunConfig:
    """How to run on this machine. Raises `LongspanError` if the data is not for this recipe."""
    table = load_source(options.data).table
    if len(table.texts) != recipe.vocab_size:
        raise LongspanError(
            f"the tokenizer in {options.data} has {len(table.texts):,} tokens, recipe "
            f"{recipe.name} {recipe.vocab_size:,}: make the corpus with the same recipe")
    has_cuda = torch.cuda.is_available()
    return RunConfig(
        out_dir=options.out, token_bytes=tuple(int(n) for n in table.num_bytes),
        device="cuda" if has_cuda else "cpu",
        deadline_s=options.deadline_s, phase_start_s=45.0 if has_cuda else 0.0,
        compile=has_cuda and not options.eager, recompute=options.recompute,
        resume=options.resume, warmup_steps=recipe.warmup_steps)


def open_rows(data: Path, mixture: Mixture) -> RowMaker:
    """Open the rows of a corpus."""
    return partial(compose_batch, source=load_source(data), mixture=mixture)


def haystacks(recipe: Recipe, data: Path, length: int) -> Iterator[Haystack]:
    """Held-out documents of about ``length`` tokens with their questions."""
    source = load_source(data, "held_out")
    for document, questions in gate_documents(
            source, length, recipe.gate_documents, recipe.gate_needles):
        yield Haystack(document, questions)


@contextmanager
def stopped_by_sigterm() -> Iterator[threading.Event]:
    """Return an event that SIGTERM sets."""
    stop = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


def export(
    recipe: Recipe, data: Path, out: Path, shards: Path | None, model_dir: Path
) -> None:
    """Write the model directory from a run's state, or from the shards that the run exported."""
    if shards:
        return join_shards(shards, model_dir)
    model = recipe.new_model(vocab_size=recipe.vocab_size)
    phase = load_weights(out, model)
    export_model(model, data / "tokenizer", model_dir, rope_theta=phase.rope_theta,
                 trained_len=phase.seq_len)


def parse_amounts(option: str, texts: Sequence[str]) -> dict[str, int]:
    """Parse ``NAME=MILLIONS`` items to numbers by name. Raises `LongspanError` for others."""
    amounts = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        if not name or not 0 < amount < math.inf:
            raise LongspanError(f"{option} {text}: write NAME=NUMBER, the number in millions")
        amounts[name] = round(amount * M)
    return amounts


def run_recipe(
    arguments: Sequence[str], recipe: Recipe, smoke: Recipe, rules: DataRules
) -> int:
    """Run one command of a recipe; returns its exit status.

    Args:
        smoke: the same in small, for ``--smoke``.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_float32_matmul_precision("high")
    app = _make_app(lambda small: smoke if small else recipe, rules)
    return run_app(app, arguments, f"python -m recipes.{recipe.name}")


def _make_app(choose: Callable[[bool], Recipe], rules: DataRules) -> Commands:
    app = Commands(help=f"From raw text to {choose(False).name}.", add_completion=False,
                      pretty_exceptions_enable=False, rich_markup_mode=None)

    @app.command("corpus")
    def corpus_command(
        root: Annotated[list[str], typer.Option(metavar="DIR=MB", help="Text to read.")],
        out: Annotated[Path, typer.Option(help="Folder for corpus and tokenizer.")],
        smoke: bool = False,
    ) -> None:
        """Read text files, train a tokenizer, write token shards."""
        roots = [Root(path=path, max_bytes=size)
                 for path, size in parse_amounts("--root", root).items()]
        print(json.dumps(make_corpus(choose(smoke), rules, roots, out)))

    @app.command("train")
    def train_command(
        data: Data, out: Out, smoke: bool = False,
        tokens: Annotated[list[str] | None, typer.Option(
            metavar="PHASE=MILLIONS", help="Tokens of one phase; repeatable.")] = None,
        resume: bool = False,
        eager: Annotated[bool, typer.Option(help="Do not compile.")] = False,
        recompute: Annotated[bool, typer.Option(help="Recompute activations.")] = False,
        deadline_s: Annotated[float, typer.Option(help="Save and end after it.")] = math.inf,
        workers: int = max(1, (os.cpu_count() or 2) - 2),
        shards: Annotated[Path | None, typer.Option(help="Export there at the end.")] = None,
    ) -> None:
        """Train through the phases."""
        train(choose(smoke), rules, TrainOptions(
            data=data, out=out, num_tokens=parse_amounts("--tokens", tokens or ()),
            resume=resume, eager=eager, recompute=recompute, deadline_s=deadline_s,
            num_workers=workers, shards=shards))

    @app.command("export")
    def export_command(
        data: Data, out: Out, model_dir: Annotated[Path, typer.Option(help="Checkpoint.")],
        smoke: bool = False,
        shards: Annotated[Path | None, typer.Option(help="What the run exported.")] = None,
    ) -> None:
        """Write a checkpoint from a run's state or shards."""
        export(choose(smoke), data, out, shards, model_dir)

    @app.command("results")
    def results_command(
        log: Annotated[Path, typer.Option(help="log.jsonl of the run.")],
        file: Annotated[Path, typer.Option(help="Result file to write.")],
        commit: str = "unknown",
        command: Annotated[str | None, typer.Option(help="What ran.")] = None,
    ) -> None:
        """Write the result file of a run."""
        name = choose(False).name
        command = command or f"python -m recipes.{name} train"
        write_results(log, file, model=name, command=command, commit=commit)

    return app
