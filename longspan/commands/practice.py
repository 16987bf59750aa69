"""A pre-trained checkpoint on conversations with many questions each, composed while training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longspan.commands import training
from longspan.commands.train import gate_haystacks
from longspan.commands.training import Limits
from longspan.data.chat.practice import LONG, PRACTICE, REPLAY, compose_practice
from longspan.data.source import load_source
from longspan.errors import LongspanError
from longspan.train.checkpoint import load_model, open_base
from longspan.train.gate import run_gate
from longspan.train.loader import ComposedFeed, RowMaker
from longspan.train.loop import RunConfig, run_phases
from longspan.train.model import CausalLM
from longspan.train.phases import Phase

GATE_LEN = 4096
"""Tokens of the gate's documents after each phase, so that phases compare."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PracticeRun:
    """What was asked for."""

    checkpoint: Path
    data: Path
    """Folder with ``corpus`` and ``tokenizer``."""
    out: Path
    phases: tuple[Phase, ...]
    kind_weights: Mapping[int, float]
    """Loss weight of each token kind."""
    warmup_steps: int
    gate_documents: int
    """Documents that are asked about after each phase, of each kind."""
    gate_needles: int
    """Questions about each."""
    limits: Limits


def run(job: PracticeRun) -> bool:
    """Train, or go on with it; True when all phases are done and the checkpoint is written."""
    base = open_base(job.checkpoint)
    resume = training.check_folder(job.out)
    source = load_source(job.data)
    if len(source.table.texts) != base.config.vocab_size:
        raise LongspanError(
            f"the tokenizer in {job.data} has {len(source.table.texts):,} tokens, the checkpoint "
            f"{base.config.vocab_size:,}: name a checkpoint that goes with its tokenizer")
    feed = ComposedFeed(
        open_rows=partial(open_rows, job.data), kind_weights=job.kind_weights,
        num_workers=job.limits.num_workers, held_out=training.held_out_rows(job.data),
        inputs={"data": job.data / "corpus", "text tokenizer":
                job.data / "tokenizer" / "tokenizer.json"},
        settings={**base.identity, "exercises": f"{dict(PRACTICE)} {dict(LONG)} {REPLAY}"})
    limits, has_cuda = job.limits, torch.cuda.is_available()
    config = RunConfig(
        out_dir=job.out, device=training.device_name(), token_bytes=training.token_bytes(source),
        warmup_steps=job.warmup_steps, final_lr=0.1 * job.phases[-1].learning_rate,
        deadline_s=limits.time_limit_s, phase_start_s=20.0 if has_cuda else 0.0,
        compile=has_cuda and not limits.eager, recompute=limits.recompute,
        rows_at_once=limits.rows_at_once, resume=resume)
    with training.joined_run(job.out) as world:
        training.check_memory(base, job.phases, world)
        model = load_model(base)
        with training.stopped_by_sigterm() as stop:
            gate = partial(_gate, job) if world.size == 1 else None
            progress = run_phases(model, job.phases, feed, config, gate, stop, world=world)
        return training.finish(model, progress, job.phases, base, job.out, world)


def _gate(job: PracticeRun, model: CausalLM, phase: Phase) -> dict[str, Any]:
    return run_gate(gate_haystacks(job.data, job.gate_documents, job.gate_needles),
                    (min(phase.seq_len, GATE_LEN),), model)


def open_rows(data: Path, phase: Phase) -> RowMaker:
    """Open the rows of a corpus."""
    assert phase.tasks is None, "practice has conversations, not tasks"
    return partial(compose_practice, source=load_source(data))
