"""The training loop over phases: one process, one device, resumable, ends at a deadline."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from longspan.errors import LongspanError
from longspan.train.files import PART, make_folder
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
from longspan.train.report import device_facts
from longspan.train.run_log import LOG_FILE, RunLog, read_log
from longspan.train.state import STATE_FILE, Progress, digest, load_state, save_state, shapes

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
"""ids int32 [B, T] and kinds uint8 [B, T]."""
Batches = Callable[[int, Sequence[Shape], int], Iterator[Batch]]
"""(phase index, schedule, first step) -> batches of the steps from there on."""
Gate = Callable[[Qwen2ForCausalLM, Phase], dict[str, Any]]
NUM_KINDS = 256
LONG_ROW = 32_768
"""Row length above which each step is logged: one takes seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How to run, apart from the phases."""

    out_dir: Path
    """Log and state go here."""
    kind_weights: Mapping[int, float]
    """Loss weight of each token kind; a kind that is not named weighs 1."""
    filler_kind: int
    """Natural text, whose bits per byte are logged."""
    answer_kind: int
    """Answers, whose accuracy is logged."""
    inputs: Mapping[str, Path] = field(default_factory=dict)
    """What the rows are made from, by name; a resumed run must find the same content there."""
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

    def __post_init__(self) -> None:
        wrong = [kind for kind in self.kind_weights if not 0 <= kind < NUM_KINDS]
        if wrong:
            raise LongspanError(f"kind_weights names kind {wrong[0]}: kinds are 0 to "
                                f"{NUM_KINDS - 1}")

    def fingerprint(self, model: torch.nn.Module, phases: Sequence[Phase]) -> dict[str, str]:
        """Return what decides the losses, by name: a run is resumed only with the same.

        Raises `LongspanError` when an input does not exist.
        """
        names = ("seed", "weight_decay", "clip_norm", "warmup_steps", "final_lr")
        return {
            **{name: digest(path) for name, path in self.inputs.items()},
            **{name: str(getattr(self, name)) for name in names},
            "kind_weights": str({int(k): w for k, w in sorted(self.kind_weights.items())}),
            "model": shapes(model.state_dict()),
            **{f"phase {phase.name}": f"{i} {phase}" for i, phase in enumerate(phases)}}


@dataclass(slots=True)
class _Meter:
    """Sums of one logging window, on the device until read."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    num_tokens: int = 0
    num_steps: int = 0
    shape: Shape = (0, 0)
    """The last batch's."""
    rate: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, shape: Shape, rate: float, values: Mapping[str, Tensor]) -> None:
        """Add one step's sums."""
        self.shape, self.rate = shape, rate
        self.num_tokens += math.prod(shape)
        self.num_steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value.detach()

    def read(self) -> dict[str, float | None]:
        """Means of the window (accuracy None without answers). Synchronises."""
        s = {name: float(value) for name, value in self.sums.items()}
        seconds = time.perf_counter() - self.started
        return {
            "loss": s["loss"] / self.num_steps,
            "bits_per_byte": s["filler_nll"] / max(1.0, s["filler_bytes"]) / math.log(2),
            "answer_accuracy": s["answer_hits"] / s["answers"] if s["answers"] else None,
            "tokens_per_s": self.num_tokens / seconds, "seconds": seconds}


class _Run:
    """State of one call of ``pretrain``."""

    def __init__(
        self, model: Qwen2ForCausalLM, phases: Sequence[Phase], config: RunConfig,
        stop: threading.Event,
    ) -> None:
        self.model, self.phases, self.config, self.stop = model, phases, config, stop
        self.device = torch.device(config.device)
        self.is_cuda = self.device.type == "cuda"
        self.started = time.perf_counter()
        self.optimizer = make_optimizer(model, config)
        self.fingerprint = config.fingerprint(model, phases)
        self.meter = _Meter()
        self.log = RunLog(config.out_dir / LOG_FILE)
        self.progress = self._open()
        self.weights = torch.ones(NUM_KINDS, device=self.device)
        for kind, weight in config.kind_weights.items():
            self.weights[kind] = weight
        size = config.token_bytes or (1,) * model.config.vocab_size
        self.token_bytes = torch.tensor(size, device=self.device, dtype=torch.float32)
        self.run: RunLayer = compiled_run_layer() if config.compile else run_layer
        self.chunk_loss = (
            torch.compile(_chunk_loss, dynamic=False) if config.compile else _chunk_loss)
        self.recompute = config.recompute

    def _open(self) -> Progress:
        """Make or check the run's folder; its log holds no step that is about to be repeated."""
        folder = self.config.out_dir
        make_folder(folder)
        for debris in folder.glob(f"*{PART}"):
            debris.unlink()
        if self.config.resume:
            progress = load_state(folder, self.model, self.optimizer, self.fingerprint)
            self.log.rewind(progress.num_tokens)
        elif (folder / STATE_FILE).exists():
            raise LongspanError(f"{folder} holds the state of a run: resume it, or name another "
                                "folder")
        else:
            progress = Progress()
            self.log.clear()
        self.log.write({"start": True, **device_facts()})
        return progress

    @property
    def elapsed_s(self) -> float:
        """Seconds since the call of ``pretrain``."""
        return time.perf_counter() - self.started

    def save(self) -> None:
        """Write the resumable state; all steps in it are in the log."""
        self.end_window()
        save_state(self.config.out_dir, self.model, self.optimizer, self.progress, self.phases,
                   self.fingerprint)
        self.meter = _Meter()

    def end_window(self) -> None:
        """Log the steps since the last time, if there are any."""
        meter, self.meter = self.meter, _Meter()
        if not meter.num_steps:
            return
        values = meter.read()
        self.progress.seconds += values["seconds"] or 0.0
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.is_cuda else 0.0
        self.log.write({
            "phase": self.phases[self.progress.phase].name, "step": self.progress.step,
            "shape": list(meter.shape), "num_tokens": self.progress.num_tokens, "lr": meter.rate,
            **values, "peak_memory_gib": memory, "elapsed_s": self.elapsed_s})

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
        loss, nll, hit = weighted_cross_entropy(
            hidden.flatten(0, 1), self.model.lm_head.weight, targets, weights.flatten(),
            self.chunk_loss)
        kinds[:, -1] = -1
        is_filler = (kinds == self.config.filler_kind).flatten()
        is_answer = (kinds == self.config.answer_kind).flatten()
        return loss, {
            "loss": loss.detach(), "filler_nll": (nll * is_filler).sum(),
            "filler_bytes": (self.token_bytes[targets] * is_filler).sum(),
            "answer_hits": (hit & is_answer).sum().float(), "answers": is_answer.sum().float()}

    def step(self, batch: Batch) -> None:
        """Take one optimizer step; when out of memory, once more with recomputation."""
        config, progress = self.config, self.progress
        rate = learning_rate(
            self.phases, progress.phase, progress.step, config.warmup_steps, config.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = self._backward(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        rows, length = batch[0].shape
        self.meter.add((rows, length), rate, sums)
        progress.step += 1
        progress.num_tokens += rows * length
        progress.trained_phase = progress.phase

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        try:
            loss, sums = self.losses(batch)
            loss.backward()
            return sums
        except torch.OutOfMemoryError:
            if self.recompute:
                raise
        # Outside the handler, because the error's frames hold the activations.
        log.warning("out of memory at %s: recomputing activations", tuple(batch[0].shape))
        self.recompute = True
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return self._backward(batch)


def make_optimizer(model: torch.nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; fused on CUDA."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    fused = config.device.startswith("cuda")
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=fused)


def pretrain(
    model: Qwen2ForCausalLM, phases: Sequence[Phase], batches: Batches, config: RunConfig,
    gate: Gate | None = None, stop: threading.Event | None = None,
) -> Progress:
    """Train through the phases from the saved or the first step; returns where it ended.

    It ends early, with the state saved, at ``deadline_s`` or once ``stop`` is set (by a signal's
    handler, for example). ``gate`` is called after each phase, if need be when the run is resumed;
    its numbers go to the log.

    Raises:
        LongspanError: bad phases; nothing to resume, or a run with other inputs; a folder that
            holds another run; a full disk.
        CheckpointError: the state to resume is not whole.
    """
    validate_phases(phases)
    torch.nn.Module.to(model, config.device)
    run = _Run(model, phases, config, stop or threading.Event())
    _ask_gate(run, gate)  # An earlier run may have ended before the gate, or in it.
    while run.progress.phase < len(phases) and not run.stop.is_set():
        if run.elapsed_s + config.phase_start_s > config.deadline_s:
            break
        if _run_phase(run, batches):
            _close_phase(run, gate)
    run.save()
    return run.progress


def _run_phase(run: _Run, batches: Batches) -> bool:
    """Train the current phase; False when the deadline or ``stop`` cut it short."""
    config, progress = run.config, run.progress
    phase = run.phases[progress.phase]
    schedule = phase.schedule(config.seed)
    set_rope(run.model, phase.rope_theta, phase.seq_len)
    run.model.train()
    if run.is_cuda:
        _choose_attention(run, phase)
    run.meter, saved_s = _Meter(), run.elapsed_s
    for batch in batches(progress.phase, schedule, progress.step):
        begin_s = run.elapsed_s
        run.step(batch)
        is_last = progress.step == phase.num_steps
        if phase.seq_len > LONG_ROW or is_last or progress.step % config.log_every == 0:
            run.end_window()
        if run.elapsed_s - saved_s > config.save_every_s:
            run.save()
            saved_s = run.elapsed_s
        ahead_s = 2 * (run.elapsed_s - begin_s)
        if run.elapsed_s + ahead_s > config.deadline_s and not is_last:
            run.stop.set()
        if run.stop.is_set() and not is_last:
            return False
    assert progress.step == phase.num_steps, "there is a batch for each step of the schedule"
    return True


def _choose_attention(run: _Run, phase: Phase) -> None:
    shape = (phase.tokens_per_step // phase.seq_len, phase.seq_len)
    heads = run.model.config.num_attention_heads
    use_backends(choose_backend(shape, heads, run.model.config.hidden_size // heads)[:1])
    torch.cuda.reset_peak_memory_stats()


def _close_phase(run: _Run, gate: Gate | None) -> None:
    """Move on to the next phase, save, and run the gate when time is left for it."""
    run.progress.phase += 1
    run.progress.step = 0
    run.save()
    _ask_gate(run, gate)


def _ask_gate(run: _Run, gate: Gate | None) -> None:
    """Log the gate's numbers for the phase before, once, between two phases."""
    progress, config = run.progress, run.config
    if gate is None or progress.phase == 0 or progress.step or run.elapsed_s > config.deadline_s:
        return
    phase = run.phases[progress.phase - 1]
    if any(row.get("gate") == phase.name for row in read_log(run.log.file)):
        return
    set_rope(run.model, phase.rope_theta, phase.seq_len)
    begin_s = run.elapsed_s
    result = gate(run.model, phase)
    run.log.write({"gate": phase.name, **result, "gate_s": run.elapsed_s - begin_s})
