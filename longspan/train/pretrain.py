"""The training loop over phases: one process, one device, resumable, ends at a deadline."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from longspan.train.loss import _chunk_loss, weighted_cross_entropy
from longspan.train.model import (
    RunLayer,
    choose_backend,
    compiled_run_layer,
    hidden_states,
    run_layer,
    set_rope,
    use_backends,
)
from longspan.train.phases import Phase, Shape, learning_rate, validate_phases
from longspan.train.state import Progress, load_state, save_state

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
"""ids int32 [B, T] and kinds uint8 [B, T]."""
Batches = Callable[[int, Sequence[Shape], int], Iterator[Batch]]
"""(phase index, schedule, first step) -> batches of the steps from there on."""
Gate = Callable[[Qwen2ForCausalLM, Phase], dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How to run, apart from the phases."""

    out_dir: Path
    """Log and state go here."""
    kind_weights: tuple[float, ...]
    """Loss weight of each token kind."""
    filler_kind: int = 0
    answer_kind: int = 3
    token_bytes: tuple[int, ...] = ()
    """Bytes of each token of the vocabulary, for bits per byte."""
    device: str = "cpu"
    seed: int = 0
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    warmup_steps: int = 150
    final_lr: float = 5e-5
    deadline_s: float = float("inf")
    """Wall clock after which the run saves and ends."""
    phase_start_s: float = 0.0
    """No phase is begun with less time left than this (compilation takes that long)."""
    save_every_s: float = 60.0
    log_every: int = 10
    compile: bool = False
    recompute: bool = False
    """Gradient checkpointing."""
    resume: bool = False


@dataclass(slots=True)
class _Meter:
    """Sums of one logging window, on the device until read."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    num_tokens: int = 0
    num_steps: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, num_tokens: int, **values: Tensor) -> None:
        """Adds one step's sums."""
        self.num_tokens += num_tokens
        self.num_steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value.detach()

    def read(self) -> dict[str, float | None]:
        """Means of the window (accuracy None without answers); synchronises."""
        s = {name: float(value) for name, value in self.sums.items()}
        seconds = time.perf_counter() - self.started
        return {
            "loss": s["loss"] / self.num_steps,
            "bits_per_byte": s["filler_nll"] / max(1.0, s["filler_bytes"]) / 0.6931472,
            "answer_accuracy": s["answer_hits"] / s["answers"] if s["answers"] else None,
            "tokens_per_s": self.num_tokens / seconds,
            "seconds": seconds,
        }


class _Run:
    """State of one call of `pretrain`."""

    def __init__(
        self, model: Qwen2ForCausalLM, phases: Sequence[Phase], config: RunConfig,
        stop: threading.Event,
    ) -> None:
        self.model, self.phases, self.config, self.stop = model, phases, config, stop
        self.device = torch.device(config.device)
        self.is_cuda = self.device.type == "cuda"
        self.started = time.perf_counter()
        self.optimizer = make_optimizer(model, config)
        self.progress = Progress()
        if config.resume:
            self.progress = load_state(config.out_dir, model, self.optimizer)
        self.weights = torch.tensor(config.kind_weights, device=self.device)
        size = config.token_bytes or (1,) * model.config.vocab_size
        self.token_bytes = torch.tensor(size, device=self.device, dtype=torch.float32)
        self.run: RunLayer = compiled_run_layer() if config.compile else run_layer
        self.chunk_loss = (
            torch.compile(_chunk_loss, dynamic=False) if config.compile else _chunk_loss
        )
        self.recompute = config.recompute
        config.out_dir.mkdir(parents=True, exist_ok=True)

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row to log.jsonl and prints it."""
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
        with (self.config.out_dir / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def save(self) -> None:
        """Writes the resumable state."""
        save_state(self.config.out_dir, self.model, self.optimizer, self.progress)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss of a batch and the sums to log."""
        ids, kinds = (x.to(self.device, non_blocking=True) for x in batch)
        dtype = torch.bfloat16 if self.is_cuda else torch.float32
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.is_cuda):
            hidden = hidden_states(self.model, ids, self.run, dtype, self.recompute)
        targets = torch.roll(ids, -1, dims=1).long().flatten()
        kinds = torch.roll(kinds, -1, dims=1).long()
        weights = self.weights[kinds]
        weights[:, -1] = 0.0
        head = self.model.model.embed_tokens.weight
        loss, nll, hit = weighted_cross_entropy(
            hidden.flatten(0, 1), head, targets, weights.flatten(), self.chunk_loss
        )
        kinds[:, -1] = -1
        is_filler = (kinds == self.config.filler_kind).flatten()
        is_answer = (kinds == self.config.answer_kind).flatten()
        return loss, {
            "loss": loss.detach(),
            "filler_nll": (nll * is_filler).sum(),
            "filler_bytes": (self.token_bytes[targets] * is_filler).sum(),
            "answer_hits": (hit & is_answer).sum().float(),
            "answers": is_answer.sum().float(),
        }

    def step(self, batch: Batch, rate: float) -> dict[str, Tensor]:
        """One optimizer step; on out-of-memory retries once with recomputation."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            loss, sums = self.losses(batch)
            loss.backward()
        except torch.OutOfMemoryError:
            if self.recompute:
                raise
            log.warning("out of memory at %s: recomputing activations", tuple(batch[0].shape))
            self.recompute = True
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            loss, sums = self.losses(batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sums


def make_optimizer(model: torch.nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; fused on CUDA."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = config.device.startswith("cuda")
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=fused)


def pretrain(
    model: Qwen2ForCausalLM,
    phases: Sequence[Phase],
    batches: Batches,
    config: RunConfig,
    gate: Gate | None = None,
    stop: threading.Event | None = None,
) -> Progress:
    """Trains through the phases from the saved or the first step; returns where it ended.

    Ends early, with the state saved, at `deadline_s` or once `stop` is set (by a signal's handler,
    for example). `gate` is called after each phase; its numbers go to the log.
    """
    validate_phases(phases)
    torch.nn.Module.to(model, config.device)
    run = _Run(model, phases, config, stop or threading.Event())
    while run.progress.phase < len(phases) and not run.stop.is_set():
        if run.elapsed() + config.phase_start_s > config.deadline_s:
            break
        if _run_phase(run, batches):
            _close_phase(run, gate)
    run.save()
    return run.progress


def _run_phase(run: _Run, batches: Batches) -> bool:
    """Trains the current phase; False when the deadline or a signal cut it short."""
    index = run.progress.phase
    phase = run.phases[index]
    schedule = phase.schedule(run.config.seed)
    set_rope(run.model, phase.rope_theta, phase.seq_len)
    run.model.train()
    if run.is_cuda:
        shape = (phase.tokens_per_step // phase.seq_len, phase.seq_len)
        heads = run.model.config.num_attention_heads
        dim = run.model.config.hidden_size // heads
        use_backends(choose_backend(shape, heads, dim)[:1])
        torch.cuda.reset_peak_memory_stats()
    meter, saved = _Meter(), run.elapsed()
    for batch in batches(index, schedule, run.progress.step):
        config, step = run.config, run.progress.step
        rate = learning_rate(run.phases, index, step, config.warmup_steps, config.final_lr)
        begin = time.perf_counter()
        sums = run.step(batch, rate)
        meter.add(batch[0].numel(), **sums)
        run.progress.step += 1
        run.progress.trained_phase = index
        run.progress.num_tokens += batch[0].numel()
        is_last = run.progress.step == phase.num_steps
        if phase.seq_len > 32_768 or is_last or run.progress.step % config.log_every == 0:
            _log_step(run, phase, meter, rate, tuple(batch[0].shape))
            meter = _Meter()
        if run.elapsed() - saved > config.save_every_s:
            run.save()
            saved = run.elapsed()
        ahead = 2 * (time.perf_counter() - begin)
        if not is_last and (run.stop.is_set() or run.elapsed() + ahead > config.deadline_s):
            run.stop.set()
            if meter.num_steps:
                _log_step(run, phase, meter, rate, tuple(batch[0].shape))
            run.save()
            return False
    return True


def _log_step(run: _Run, phase: Phase, meter: _Meter, rate: float, shape: tuple[int, ...]) -> None:
    values = meter.read()
    run.progress.seconds += values["seconds"] or 0.0
    memory = torch.cuda.max_memory_allocated() / 2**30 if run.is_cuda else 0.0
    run.write(
        {
            "phase": phase.name,
            "step": run.progress.step,
            "shape": list(shape),
            "num_tokens": run.progress.num_tokens,
            "lr": rate,
            **values,
            "peak_memory_gib": memory,
            "elapsed_s": run.elapsed(),
        }
    )


def _close_phase(run: _Run, gate: Gate | None) -> None:
    """Moves on to the next phase, saves, and runs the gate when time is left for it."""
    phase = run.phases[run.progress.phase]
    run.progress.phase += 1
    run.progress.step = 0
    run.save()
    if gate is not None and run.elapsed() < run.config.deadline_s:
        begin = time.perf_counter()
        result = gate(run.model, phase)
        run.write({"gate": phase.name, **result, "gate_s": time.perf_counter() - begin})
