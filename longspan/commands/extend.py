"""``longspan train extend``: a checkpoint of someone's own, to a longer context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longspan.commands import training
from longspan.commands.corpus import CORPUS, TOKENIZER, open_source, prepare_corpus
from longspan.commands.training import DATA, Limits
from longspan.data.tokens import Kind, load_tokenizer
from longspan.errors import LongspanError
from longspan.recipes.recipe import DataRules
from longspan.train.budget import Processes, plan
from longspan.train.checkpoint import Base, load_model, open_base
from longspan.train.loader import ComposedFeed
from longspan.train.loop import RunConfig, run_phases
from longspan.train.phases import Phase
from longspan.train.rows import RowsFeed, is_rows_folder
from longspan.train.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtendRun:
    """A whole extension: checkpoint, data, phases, optimizer."""

    checkpoint: Path
    corpus: tuple[str, ...]
    """Folders or files of text, or one folder of rows or of a corpus that ``longspan`` wrote."""
    out: Path
    phases: tuple[Phase, ...]
    rules: DataRules = DataRules()
    kind_weights: Mapping[int, float] = field(default_factory=lambda: {
        Kind.PLANTED: 0.0, Kind.ANSWER: 2.0})
    """Loss weight of each token kind; a value that is random at its first mention has none."""
    weight_decay: float = 0.1
    warmup_steps: int = 10
    final_share: float = 0.1
    """Share of the last phase's rate that is left at its end."""
    seed: int = 0
    limits: Limits = Limits()


def dry_run(run: ExtendRun, gpus: Processes) -> None:
    """Print what the phases need. Raises `NotEnoughMemoryError` where they do not fit."""
    base = open_base(run.checkpoint)
    training.show_plan(
        f"{run.checkpoint.name} on {gpus.num} GPUs of {gpus.memory_gib:g} GiB",
        plan(base.config, run.phases, gpus))


def extend(run: ExtendRun) -> bool:
    """Train, or go on with it; True when all phases are done and the checkpoint is written."""
    base = open_base(run.checkpoint)
    resume = training.check_folder(run.out)
    with training.joined_run(run.out, run.limits.context_parallel) as world:
        training.check_memory(base, run.phases, world)
        feed, sizes = _open_feed(run, base, world)
        model = load_model(base)
        with training.stopped_by_sigterm() as stop:
            progress = run_phases(model, run.phases, feed, _config(run, resume, sizes), stop=stop,
                                  world=world)
        return training.finish(
            model, progress, run.phases, base, run.out, world, run.phases[-1])


def _config(run: ExtendRun, resume: bool, sizes: tuple[int, ...]) -> RunConfig:
    has_cuda = torch.cuda.is_available()
    return RunConfig(
        out_dir=run.out, token_bytes=sizes, device=training.device_name(), seed=run.seed,
        weight_decay=run.weight_decay, warmup_steps=run.warmup_steps,
        final_lr=run.final_share * run.phases[-1].learning_rate,
        deadline_s=run.limits.time_limit_s, phase_start_s=30.0 if has_cuda else 0.0,
        compile=has_cuda and not run.limits.eager, recompute=run.limits.recompute,
        rows_at_once=run.limits.rows_at_once, resume=resume)


def _open_feed(
    run: ExtendRun, base: Base, world: World
) -> tuple[ComposedFeed | RowsFeed, tuple[int, ...]]:
    """Return the rows, and the bytes of each token."""
    if len(run.corpus) == 1 and is_rows_folder(Path(run.corpus[0])):
        folder = Path(run.corpus[0])
        _check_tokenizer(folder, base)
        source = open_source(folder, "train", True)
        feed: ComposedFeed | RowsFeed = RowsFeed.open(
            folder, run.phases, seed=run.seed, vocab_size=base.config.vocab_size,
            held_out=training.held_out_rows(folder), identity=base.identity)
        return feed, training.token_bytes(source)
    data = _made_corpus(run.corpus)
    if data is not None:
        _check_tokenizer(data, base)
    else:
        data = run.out / DATA
        if world.is_first:
            prepare_corpus(training.text_job(run.corpus, base, run.rules, data))
        world.barrier()
    source = open_source(data, "train", run.rules.may_join)
    longest = max(phase.seq_len for phase in run.phases)
    training.check_text(source, base.config.vocab_size, run.rules.mixture, longest)
    settings: dict[str, Any] = {"mixture": str(sorted(run.rules.mixture.weights.items())),
                                "may_join": str(run.rules.may_join)}
    composed = ComposedFeed(
        open_rows=partial(training.open_rows, data, run.rules.mixture, run.rules.may_join),
        kind_weights=run.kind_weights, seed=run.seed, num_workers=run.limits.num_workers,
        inputs={"data": data / "corpus"}, settings={**settings, **base.identity},
        held_out=training.held_out_rows(data) if run.rules.held_out else None)
    return composed, training.token_bytes(source)


def _made_corpus(sources: Sequence[str]) -> Path | None:
    """Return the folder that an earlier command made a corpus in, if that is what was named."""
    folder = Path(sources[0])
    is_made = len(sources) == 1 and (folder / CORPUS / "meta.json").is_file()
    return folder if is_made else None


def _check_tokenizer(made: Path, base: Base) -> None:
    if load_tokenizer(made / TOKENIZER).to_str() != load_tokenizer(base.folder).to_str():
        raise LongspanError(f"{made} is in the tokens of another tokenizer: make it with "
                            f"--tokenizer {base.folder}")


def with_limits(run: ExtendRun, limits: Limits) -> ExtendRun:
    """Return the same run with other limits."""
    return replace(run, limits=limits)


def parse_phases(texts: Sequence[str], tokens_per_step: int | None) -> tuple[Phase, ...]:
    """Parse ``LENGTH:BASE:TOKENS:RATE`` items. Raises `LongspanError` for others."""
    from longspan.commands.options import parse_length
    from longspan.train.phases import TOKENS_PER_STEP, short_length, shorter_lengths

    phases = []
    for text in texts:
        try:
            length_text, base, tokens, rate = text.split(":")
            length, numbers = parse_length(length_text), [float(base), float(tokens), float(rate)]
            is_fine = length > 0 and all(number > 0 for number in numbers)
        except ValueError:
            is_fine = False
        if not is_fine:
            raise LongspanError(f"--phase {text}: write LENGTH:BASE:TOKENS:RATE, such as "
                                "128k:5e6:30e6:2e-5")
        step = tokens_per_step or length * max(1, TOKENS_PER_STEP // length)
        shorter = shorter_lengths(length, min(4096, length))
        phases.append(Phase(
            name=short_length(length), seq_len=length, rope_theta=numbers[0],
            num_tokens=round(numbers[1]), learning_rate=numbers[2], shorter=shorter,
            full_share=0.75 if shorter else 1.0, tokens_per_step=step))
    return tuple(phases)
