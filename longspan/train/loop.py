"""The training loop over phases: resumable, ends at a deadline; one process or many."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from longspan.errors import LongspanError
from longspan.files.whole import PART, make_folder
from longspan.train.attention import choose_backend, use_backends
from longspan.train.batch import Batch, Feed
from longspan.train.budget import step_flops
from longspan.train.loss import compiled_chunk_loss
from longspan.train.meter import Meter
from longspan.train.model import (
    CausalLM,
    compiled_run_layer,
    head_dim,
    model_config,
    run_layer,
    set_rope,
)
from longspan.train.objective import CrossEntropy, Objective
from longspan.train.phases import Phase, Shape, learning_rate, validate_phases
from longspan.train.report import device_facts
from longspan.train.run_log import BEFORE, LOG_FILE, RunLog, read_log
from longspan.train.state import STATE_FILE, Progress, load_state, save_state, shapes
from longspan.train.step import Step
from longspan.train.world import World

log = logging.getLogger(__name__)

Gate = Callable[[CausalLM, Phase], dict[str, Any]]
"""Measures a model, in one process; the phase is the one that trained it last."""
Before = Callable[[Step, Callable[[], bool]], Feed | None]
"""Looks at the untrained model until it is told that time is up."""
LONG_ROW = 32_768
"""Row length above which each step is logged: one takes seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How to run, apart from the phases."""

    out_dir: Path
    """Log and state go here."""
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
    rows_at_once: int | None = None
    """Rows of a forward pass at most, whose gradients add up; None: as many as fit."""
    resume: bool = False
    objective: Objective | None = None
    """The loss; None: weighted cross-entropy."""

    def fingerprint(
        self, model: torch.nn.Module, phases: Sequence[Phase], feed: Feed
    ) -> dict[str, str]:
        """Return what decides the losses, by name: a run is resumed only with the same.

        Raises `LongspanError` when what rows are made from does not exist.
        """
        names = ("seed", "weight_decay", "clip_norm", "warmup_steps", "final_lr")
        return {
            **feed.identity, **{name: str(getattr(self, name)) for name in names},
            "model": shapes(model.state_dict()),
            **{f"phase {phase.name}": f"{i} {phase}" for i, phase in enumerate(phases)},
            # apart, so that runs from before there were any are resumed
            **{f"tasks of phase {phase.name}": str(dict(phase.tasks))
               for phase in phases if phase.tasks}}


class _Run:
    """State of one call of `run_phases`."""

    def __init__(
        self, model: CausalLM, phases: Sequence[Phase], feed: Feed, config: RunConfig,
        world: World, stop: threading.Event,
    ) -> None:
        self.model, self.phases, self.feed, self.config = model, phases, feed, config
        self.world, self.stop = world, stop
        self.is_cuda = world.device.type == "cuda"
        self.shape = model_config(model)
        self.started = time.perf_counter()
        self.fingerprint = config.fingerprint(model, phases, feed)
        is_compiled = config.compile and world.size == 1
        self.cross_entropy = cross_entropy(model, config, world)
        self.step_module = Step(
            model, config.objective or self.cross_entropy, world,
            run=compiled_run_layer() if is_compiled else run_layer,
            recompute=config.recompute, rows_at_once=config.rows_at_once)
        world.shard(self.step_module, model.model.layers)
        self.optimizer = make_optimizer(model, config)
        self.meter = Meter()
        self.save_s = 0.0
        self.log = RunLog(config.out_dir / LOG_FILE, world.is_first)
        self.progress = self._open()

    def _open(self) -> Progress:
        """Make or check the run's folder; its log holds no step that is about to be repeated."""
        folder = self.config.out_dir
        if self.world.is_first:
            make_folder(folder)
            for debris in folder.glob(f"*{PART}"):
                debris.unlink()
        self.world.barrier()
        if self.config.resume:
            progress = load_state(folder, self.model, self.optimizer, self.fingerprint)
            self.log.rewind(progress.num_tokens)
        elif (folder / STATE_FILE).exists():
            raise LongspanError(f"{folder} holds the state of a run: resume it, or name another "
                                "folder")
        else:
            progress = Progress()
            self.log.clear()
        self.log.write({"start": True, **device_facts(self.world.size)})
        return progress

    @property
    def elapsed_s(self) -> float:
        """Seconds since the call of `run_phases`."""
        return time.perf_counter() - self.started

    def is_over(self, ahead_s: float = 0.0) -> bool:
        """Whether the deadline comes sooner than that or ``stop`` is set, in any process."""
        late = self.elapsed_s + ahead_s > self.config.deadline_s
        if self.world.any(late or self.stop.is_set()):
            self.stop.set()
        return self.stop.is_set()

    def save(self) -> None:
        """Write the resumable state; all steps in it are in the log."""
        self.end_window()
        begin_s = self.elapsed_s
        save_state(self.config.out_dir, self.model, self.optimizer, self.progress, self.phases,
                   self.fingerprint, self.world)
        self.save_s = self.elapsed_s - begin_s
        self.meter = Meter()

    def end_window(self) -> None:
        """Log the steps since the last time, if there are any."""
        meter, self.meter = self.meter, Meter()
        if not meter.num_steps:
            return
        values = meter.read(self.world)
        self.progress.seconds += values["seconds"] or 0.0
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.is_cuda else 0.0
        self.log.write({
            "phase": self.phases[self.progress.phase].name, "step": self.progress.step,
            "shape": list(meter.shape), "num_tokens": self.progress.num_tokens, "lr": meter.rate,
            **values, "peak_memory_gib": memory, "elapsed_s": self.elapsed_s})

    def step(self, batch: Batch, num_steps: int) -> None:
        """Take one optimizer step."""
        config, progress = self.config, self.progress
        rate = learning_rate(self.phases, progress.phase, progress.step, num_steps,
                             config.warmup_steps, config.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        shape: Shape = (batch.ids.shape[0], batch.ids.shape[1])
        sums = self.step_module.backward(self.world.rows(batch).to(self.world.device))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.add(shape, step_flops(self.shape, shape), rate, sums)
        progress.step += 1
        progress.num_tokens += shape[0] * shape[1]
        progress.trained_phase = progress.phase


def cross_entropy(model: CausalLM, config: RunConfig, world: World) -> CrossEntropy:
    """Return the loss of ordinary training."""
    size = config.token_bytes or (1,) * model.config.vocab_size
    padded = (*size, *(0,) * (model.config.vocab_size - len(size)))
    return CrossEntropy(torch.tensor(padded, device=world.device, dtype=torch.float32),
                        compiled_chunk_loss(config.compile))


def make_optimizer(model: torch.nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; fused on CUDA."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    fused = config.device.startswith("cuda")
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=fused)


def run_phases(
    model: CausalLM, phases: Sequence[Phase], feed: Feed, config: RunConfig,
    gate: Gate | None = None, stop: threading.Event | None = None, *,
    world: World | None = None, before: Before | None = None,
) -> Progress:
    """Train through the phases from the saved or the first step; returns where it ended.

    It ends early, with the state saved, at ``deadline_s`` or once ``stop`` is set (by a signal's
    handler, for example). ``gate`` is called after each phase, if need be when the run is resumed;
    its numbers go to the log, with the feed's held-out text before the first step and after each.

    Args:
        world: the processes that take part; default: this one alone.
        before: returns the rows to train on after it has looked at the untrained model, or None
            when time was up first; nothing is trained then.

    Raises:
        LongspanError: bad phases; nothing to resume, or a run with other inputs; a folder that
            holds another run; a full disk.
        CheckpointError: the state to resume is not whole.
        NotEnoughMemoryError: a row does not fit the memory.
    """
    validate_phases(phases)
    world = world or World(torch.device(config.device))
    torch.nn.Module.to(model, world.device)
    run = _Run(model, phases, feed, config, world, stop or threading.Event())
    _check_shapes(run)
    if before is not None:
        set_rope(model, phases[0].rope_theta, phases[0].seq_len)
        looked_at = before(run.step_module, run.is_over)
        if looked_at is None:
            return run.progress
        run.feed = looked_at
    _ask_gate(run, gate)  # An earlier run may have ended before the gate, or in it.
    while run.progress.phase < len(phases) and not run.is_over(config.phase_start_s):
        if _run_phase(run):
            _close_phase(run, gate)
    run.save()
    return run.progress


def _check_shapes(run: _Run) -> None:
    for index, phase in enumerate(run.phases):
        for shape in set(run.feed.schedule(index, phase)):
            run.world.check_shape(shape, run.step_module.objective.rows_together)


def _run_phase(run: _Run) -> bool:
    """Train the current phase; False when the deadline or ``stop`` cut it short."""
    config, progress = run.config, run.progress
    phase = run.phases[progress.phase]
    schedule = run.feed.schedule(progress.phase, phase)
    set_rope(run.model, phase.rope_theta, phase.seq_len)
    run.model.train()
    if run.is_cuda:
        _choose_attention(run, schedule)
    run.meter, saved_s = Meter(), run.elapsed_s
    for batch in run.feed.batches(progress.phase, phase, progress.step):
        begin_s = run.elapsed_s
        run.step(batch, len(schedule))
        is_last = progress.step == len(schedule)
        if phase.seq_len > LONG_ROW or is_last or progress.step % config.log_every == 0:
            run.end_window()
        # A large state takes a while: at most a twentieth of the time goes to saving it.
        wait_s = max(config.save_every_s, 20 * run.save_s if config.save_every_s > 0 else 0.0)
        if run.world.any(run.elapsed_s - saved_s > wait_s):
            run.save()
            saved_s = run.elapsed_s
        if not is_last and run.is_over(2 * (run.elapsed_s - begin_s)):
            return False
    assert progress.step == len(schedule), "there is a batch for each step of the schedule"
    return True


def _choose_attention(run: _Run, schedule: Sequence[Shape]) -> None:
    rows, length = max(schedule, key=lambda shape: shape[1])
    rows = max(1, min(rows, run.config.rows_at_once or rows) // run.world.num_row_groups)
    backends = [SDPBackend.FLASH_ATTENTION]
    if run.world.context.size == 1:
        heads = run.model.config.num_attention_heads
        backends = choose_backend((rows, length), heads, head_dim(run.model))[:1]
    use_backends(backends)
    torch.cuda.reset_peak_memory_stats()


def _close_phase(run: _Run, gate: Gate | None) -> None:
    """Move on to the next phase, save, and run the gate when time is left for it."""
    run.progress.phase += 1
    run.progress.step = 0
    run.save()
    _ask_gate(run, gate)


def _ask_gate(run: _Run, gate: Gate | None) -> None:
    """Log numbers for the model before the first step and after each phase, once."""
    progress, held_out = run.progress, run.feed.held_out
    is_asked = held_out is not None or (gate is not None and progress.phase > 0)
    if not is_asked or progress.step or run.is_over():
        return
    phase = run.phases[max(0, progress.phase - 1)]
    name = phase.name if progress.phase else BEFORE
    is_known = run.world.is_first and any(
        row.get("gate") == name for row in read_log(run.log.file))
    if run.world.any(is_known):
        return
    if progress.phase:
        set_rope(run.model, phase.rope_theta, phase.seq_len)
    begin_s, found = run.elapsed_s, {}
    if held_out is not None:
        found["held_out_bits_per_byte"] = run.step_module.bits_per_byte(
            held_out, run.cross_entropy)
        found["held_out_tokens"] = held_out.ids.numel()
    if gate is not None and progress.phase:
        found |= gate(run.model, phase)
    run.log.write({"gate": name, "num_tokens": progress.num_tokens, **found,
                   "gate_s": run.elapsed_s - begin_s})
