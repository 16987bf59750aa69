"""``longspan train sft`` and ``dpo``: a checkpoint on conversations, then on preferences."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from longspan.commands import training
from longspan.commands.training import Limits
from longspan.errors import LongspanError
from longspan.train.batch import Feed
from longspan.train.chat import ChatEncoder, Dialogue, Samples, read_dialogues, read_pairs
from longspan.train.checkpoint import Base, load_model, open_base
from longspan.train.loop import RunConfig, run_phases
from longspan.train.loss import compiled_chunk_loss
from longspan.train.objective import Preference
from longspan.train.phases import Phase
from longspan.train.reference import REFERENCE_FILE, compute_reference, load_reference
from longspan.train.samples import SampleFeed, check_lengths
from longspan.train.state import digest
from longspan.train.step import Step


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Conversations of one stage of fine-tuning."""

    name: str
    files: tuple[Path, ...]
    max_length: int
    """Tokens of a row, at most; the report's are 32,768 in its first and 262,144 in its second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneRun:
    """What both ways of tuning share: checkpoint, optimizer, limits."""

    checkpoint: Path
    out: Path
    learning_rate: float
    tokens_per_step: int
    weight_decay: float
    epochs: int = 1
    warmup_steps: int = 10
    seed: int = 0
    limits: Limits = Limits()


@dataclass(frozen=True, kw_only=True, slots=True)
class SftRun(TuneRun):
    """A whole fine-tuning."""

    stages: tuple[Stage, ...]
    learning_rate: float = 7e-6
    """Qwen2.5's; it falls to a tenth in the last stage."""
    tokens_per_step: int = 262_144
    weight_decay: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoRun(TuneRun):
    """A whole preference training."""

    files: tuple[Path, ...]
    max_length: int = 8192
    """Tokens of a row, at most, as in the report."""
    beta: float = 0.1
    by_length: bool = False
    sft_weight: float = 0.1
    learning_rate: float = 7e-7
    """Qwen2.5's offline stage; small models take more."""
    tokens_per_step: int = 131_072
    weight_decay: float = 0.0


def sft(run: SftRun) -> bool:
    """Train, or go on with it; True when all stages are done and the checkpoint is written."""
    base = open_base(run.checkpoint)
    resume = training.check_folder(run.out)
    encoder = ChatEncoder(base.folder)
    stages, identity = [], dict(base.identity)
    for stage in run.stages:
        dialogues = read_dialogues(stage.files)
        samples = _encode(encoder, base, dialogues)
        check_lengths(samples, [row.place for row in dialogues], stage.max_length, stage.name)
        stages.append(samples)
        identity[f"data of {stage.name}"] = " ".join(digest(file) for file in stage.files)
    feed = SampleFeed(
        stages=tuple(stages), tokens_per_step=run.tokens_per_step, seed=run.seed,
        epochs=run.epochs, identity={**identity, **_settings(run, encoder)})
    phases = [feed.phase(i, stage.name, base.config.rope_theta, run.learning_rate)
              for i, stage in enumerate(run.stages)]
    return _train(run, base, phases, feed, resume)


def dpo(run: DpoRun) -> bool:
    """Train, or go on with it; True when all pairs were seen and the checkpoint is written."""
    base = open_base(run.checkpoint)
    resume = training.check_folder(run.out)
    encoder = ChatEncoder(base.folder)
    dialogues = read_pairs(run.files)
    samples = _encode(encoder, base, dialogues)
    check_lengths(samples, [row.place for row in dialogues], run.max_length, "pairs")
    data = " ".join(digest(file) for file in run.files)
    identity = {**base.identity, "data": data, "beta": str(run.beta),
                "length normalisation": str(run.by_length), "sft weight": str(run.sft_weight)}
    feed = SampleFeed(
        stages=(samples,), tokens_per_step=run.tokens_per_step, seed=run.seed, epochs=run.epochs,
        together=2, identity={**identity, **_settings(run, encoder)})
    phases = [feed.phase(0, "dpo", base.config.rope_theta, run.learning_rate)]
    made_from = hashlib.sha256(
        f"{base.identity} {data} {encoder.template}".encode()).hexdigest()
    file = run.out / REFERENCE_FILE
    values = load_reference(file, made_from, len(samples))

    def before(step: Step, is_over: Callable[[], bool]) -> Feed | None:
        found = compute_reference(step, feed, values, file, made_from, is_over)
        return None if found is None else feed.with_reference(found)

    objective = Preference(compiled_chunk_loss(torch.cuda.is_available()), run.beta, run.by_length,
                           run.sft_weight)
    return _train(run, base, phases, feed, resume, objective, before)


def _settings(run: TuneRun, encoder: ChatEncoder) -> dict[str, str]:
    return {"data seed": str(run.seed), "epochs": str(run.epochs),
            "tokens per step": str(run.tokens_per_step),
            "chat template": hashlib.sha256(encoder.template.encode()).hexdigest()}


def _encode(encoder: ChatEncoder, base: Base, dialogues: Sequence[Dialogue]) -> Samples:
    samples = encoder.encode(dialogues)
    largest = int(samples.ids.max())
    if largest >= base.config.vocab_size:
        raise LongspanError(f"token {largest:,} of {base.folder}'s tokenizer is beyond the model's "
                            f"{base.config.vocab_size:,}: mend the checkpoint")
    sums = np.add.reduceat(samples.is_answer, samples.starts[:-1])
    if not sums.all():
        raise LongspanError(f"{dialogues[int(np.flatnonzero(sums == 0)[0])].place}: no token of "
                            "the answers is learned: leave the row out")
    return samples


def _train(
    run: TuneRun, base: Base, phases: Sequence[Phase], feed: SampleFeed, resume: bool,
    objective: Preference | None = None,
    before: Callable[[Step, Callable[[], bool]], Feed | None] | None = None,
) -> bool:
    with training.joined_run(run.out, run.limits.context_parallel) as world:
        training.check_memory(base, phases, world, feed.together)
        model = load_model(base)
        with training.stopped_by_sigterm() as stop:
            progress = run_phases(
                model, phases, feed, _config(run, resume, phases, objective), stop=stop,
                world=world, before=before)
        return training.finish(model, progress, phases, base, run.out, world)


def _config(
    run: TuneRun, resume: bool, phases: Sequence[Phase], objective: Preference | None
) -> RunConfig:
    has_cuda = torch.cuda.is_available()
    return RunConfig(
        out_dir=run.out, device=training.device_name(), seed=run.seed,
        weight_decay=run.weight_decay,
        warmup_steps=run.warmup_steps, final_lr=0.1 * phases[-1].learning_rate,
        deadline_s=run.limits.time_limit_s, phase_start_s=20.0 if has_cuda else 0.0,
        compile=has_cuda and not run.limits.eager, recompute=run.limits.recompute,
        rows_at_once=run.limits.rows_at_once, resume=resume, objective=objective)
