"""From raw text to a pre-trained model by a recipe: corpus, tokenizer, phases, export.

This file joins two halves that never import each other: ``longspan.data`` makes the rows,
``longspan.train`` is the loop.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longspan.commands.console import note
from longspan.commands.corpus import CorpusJob
from longspan.commands.training import PLOT, open_rows, stopped_by_sigterm
from longspan.data.corpus import (
    choose_held_out,
    lower_words,
    most_frequent,
    sample_texts,
    write_corpus,
)
from longspan.data.documents import Reader, Root
from longspan.data.filters import Refusal
from longspan.data.gate_documents import gate_documents
from longspan.data.intake import Intake
from longspan.data.source import load_source
from longspan.data.templates import template_texts
from longspan.errors import LongspanError
from longspan.recipes.recipe import Recipe
from longspan.train.export import export_model
from longspan.train.gate import Haystack, run_gate
from longspan.train.loader import ComposedFeed
from longspan.train.loop import RunConfig, run_phases
from longspan.train.model import CausalLM
from longspan.train.phases import Phase, with_tokens
from longspan.train.plot import draw_run
from longspan.train.run_log import LOG_FILE
from longspan.train.state import load_weights
from longspan.train.tokenizer import save_tokenizer, train_tokenizer

M = 1_000_000
PHASES = "phases"
"""Folder with a checkpoint of each finished phase, in the folder of a run."""
SHARD_SIZE = "14MB"
"""Shards of a run travel as small files."""


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


def make_corpus(recipe: Recipe, roots: Sequence[Root], out: Path) -> dict[str, Any]:
    """Read text, train the tokenizer on a sample and on templates, write the corpus; its counts."""
    intake, rules = Intake(), recipe.rules
    documents = list(Reader(rules.reading, Refusal(rules.filters), intake).read(roots))
    if not documents:
        raise LongspanError(f"no text that can be used: {intake.left_out()}")
    is_held_out = choose_held_out(
        [d.name for d in documents], [len(d.text) for d in documents], rules.held_out,
        way_out=" (files are joined by their first two folders)")
    seen = [d for d, out in zip(documents, is_held_out, strict=True) if not out]
    words = Counter(word for document in seen for word in lower_words(document.text))
    texts = [*sample_texts(seen), *template_texts(most_frequent(words))]
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    save_tokenizer(tokenizer, out / "tokenizer")
    # In the spelling that later commands over the same corpus write again.
    (out / "tokenizer" / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return write_corpus(documents, tokenizer, out / "corpus", intake, rules.held_out,
                        {"made_from": corpus_job(recipe, roots, out).identity})


def corpus_job(recipe: Recipe, roots: Sequence[Root], out: Path) -> CorpusJob:
    """Return the corpus of a recipe as other commands know it; its tokenizer must be there."""
    rules = recipe.rules
    return CorpusJob(roots=roots, reading=rules.reading, filters=rules.filters,
                     tokenizer=out / "tokenizer", out=out, held_out=rules.held_out, may_join=True)


def train(recipe: Recipe, options: TrainOptions) -> bool:
    """Run or resume the phases; SIGTERM saves and ends. True when all are done."""
    phases = with_tokens(recipe.phases, options.num_tokens)
    config = run_config(recipe, options)
    model = recipe.new_model(vocab_size=recipe.vocab_size)
    feed = ComposedFeed(
        open_rows=partial(open_rows, options.data, recipe.rules.mixture, True),
        kind_weights=recipe.kind_weights, num_workers=options.num_workers, inputs={
            "data": options.data / "corpus",
            "tokenizer": options.data / "tokenizer" / "tokenizer.json"})
    gate = partial(_close_phase, recipe, options)
    with stopped_by_sigterm() as stop:
        progress = run_phases(model, phases, feed, config, gate, stop)
    draw_run(options.out / LOG_FILE, options.out / PLOT)
    note(f"ended at {progress}")
    if options.shards:
        phase = progress.trained(phases)
        export_model(
            model, options.data / "tokenizer", options.shards, rope_theta=phase.rope_theta,
            trained_len=phase.seq_len, max_shard_size=SHARD_SIZE)
    return progress.phase == len(phases)


def _close_phase(
    recipe: Recipe, options: TrainOptions, model: CausalLM, phase: Phase
) -> dict[str, Any]:
    """Keep the model of a phase, so that each can be judged by itself, and run the gate."""
    export_model(model, options.data / "tokenizer", options.out / PHASES / phase.name,
                 rope_theta=phase.rope_theta, trained_len=phase.seq_len)
    lengths = recipe.gate_lengths
    return run_gate(gate_haystacks(options.data, recipe.gate_documents, recipe.gate_needles),
                    lengths if phase.seq_len == max(lengths) else (phase.seq_len,), model)


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


def gate_haystacks(
    data: Path, num_documents: int, num_needles: int
) -> dict[str, Callable[[int], Iterator[Haystack]]]:
    """Return what makes held-out documents of about so many tokens, by what they are asked for."""
    source = load_source(data, "held_out")

    def make(length: int, number_first: bool) -> Iterator[Haystack]:
        for document, questions in gate_documents(
                source, length, num_documents, num_needles, number_first=number_first):
            yield Haystack(document, questions)

    return {"needles": partial(make, number_first=False),
            "number_first": partial(make, number_first=True)}


def export(recipe: Recipe, data: Path, out: Path, model_dir: Path) -> None:
    """Write the model directory from a run's state."""
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
