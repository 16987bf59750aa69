"""What all training commands share: folders of runs, data from text, the loop, the result."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch

from longspan.commands.console import note, show_table
from longspan.commands.corpus import CorpusJob, open_source
from longspan.data.documents import Root
from longspan.data.rows import Mixture, compose_batch
from longspan.data.source import Source
from longspan.data.tasks import DOCUMENT_TASKS
from longspan.errors import LongspanError
from longspan.files.owned import owned_folder
from longspan.files.whole import check_is_folder
from longspan.recipes.recipe import DataRules
from longspan.train.batch import FILLER, Batch
from longspan.train.budget import GIB, PhaseCost, Processes, plan
from longspan.train.checkpoint import Base, save_trained
from longspan.train.loader import RowMaker
from longspan.train.model import CausalLM
from longspan.train.phases import Phase
from longspan.train.plot import draw_run
from longspan.train.run_log import LOG_FILE
from longspan.train.state import STATE_FILE, Progress, whole_weights
from longspan.train.world import World, joined_world

DATA, MODEL, PLOT = "data", "model", "log.svg"
KNOWN = (DATA, MODEL, PLOT, LOG_FILE, STATE_FILE, "reference.npz")
CPU_TFLOPS = 0.05
HELD_OUT_LEN = 2048
"""Row length at which held-out text is measured."""
HELD_OUT_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When a command ends, whatever is left to do."""

    time_limit_s: float = math.inf
    num_workers: int = 0
    eager: bool = False
    recompute: bool = False
    rows_at_once: int | None = None
    context_parallel: int = 1


def device_name() -> str:
    """Return where to train: ``cuda`` where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def joined_run(out: Path, context_parallel: int = 1) -> Iterator[World]:
    """Join the processes that train together; the run's folder is theirs alone meanwhile. Raises
    `LongspanError` where another run has it."""
    with joined_world(device_name(), context_parallel) as world, \
            owned_folder(out) if world.is_first else nullcontext():
        yield world


def check_folder(out: Path) -> bool:
    """Whether a run in the folder is to be gone on with. Raises `LongspanError` for a file, and a
    folder of other things."""
    check_is_folder(out)
    others = [path.name for path in out.iterdir()
              if path.name not in KNOWN and not path.name.endswith(".part")] if out.exists() else []
    if others:
        raise LongspanError(f"{out} has other files ({sorted(others)[0]}): name a new folder, or "
                            "that of the run to go on with")
    return (out / STATE_FILE).exists()


def this_machine(world: World) -> Processes:
    """Return the memory that training has here, on each process."""
    if world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
        return Processes(num=world.size, context_parallel=world.context.size,
                         memory_gib=0.97 * memory / GIB)
    free = psutil.virtual_memory().available / world.size
    return Processes(num=world.size, context_parallel=world.context.size, tflops=CPU_TFLOPS,
                     memory_gib=free / GIB)


def show_plan(title: str, costs: Sequence[PhaseCost]) -> None:
    """Print what each phase costs."""
    rows = [(
        cost.phase.name, f"{cost.phase.seq_len:,}", f"{cost.phase.rope_theta:g}",
        f"{cost.phase.num_tokens:,}", f"{cost.phase.learning_rate:g}", f"{cost.flops:.2e}",
        f"{cost.memory_gib:.1f} GiB" + (", recomputed" if cost.recompute else ""),
        duration(cost.seconds)) for cost in costs]
    total = sum(cost.seconds for cost in costs)
    rows.append(("total", "", "", f"{sum(c.phase.num_tokens for c in costs):,}", "",
                 f"{sum(c.flops for c in costs):.2e}", "", duration(total)))
    show_table(title, ("phase", "row", "RoPE base", "tokens", "rate", "FLOPs", "memory each",
                       "time"), rows)


def duration(seconds: float) -> str:
    """Format a time from seconds to days."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def check_memory(base: Base, phases: Sequence[Phase], world: World, rows_together: int = 1) -> None:
    """Raise `NotEnoughMemoryError` when a phase needs more memory than there is."""
    plan(base.config, phases, this_machine(world), rows_together)


def text_job(sources: Sequence[str], base: Base, rules: DataRules, out: Path) -> CorpusJob:
    """Return the corpus that text becomes in the tokens of a checkpoint."""
    return CorpusJob(
        roots=[Root(path=source) for source in sources], reading=rules.reading,
        filters=rules.filters, tokenizer=base.folder, out=out, held_out=rules.held_out,
        may_join=rules.may_join)


def open_rows(data: Path, mixture: Mixture, may_join: bool, phase: Phase) -> RowMaker:
    """Return what composes a phase's rows of a corpus."""
    return partial(compose_batch, source=open_source(data, "train", may_join),
                   mixture=mixture.of(phase.tasks))


def check_text(source: Source, vocab_size: int, mixture: Mixture, longest: int) -> None:
    """Raise `LongspanError` when text and rows do not go together."""
    if len(source.table.texts) > vocab_size:
        raise LongspanError(f"the tokenizer has {len(source.table.texts):,} tokens, the model "
                            f"{vocab_size:,}: name a checkpoint that goes with its tokenizer")
    total, document = int(source.corpus.lengths.sum()), int(source.corpus.lengths[-1])
    if total < longest:
        raise LongspanError(f"rows of {longest:,} tokens: all training text has {total:,}; add "
                            "text, or train on shorter rows")
    needy = [name for name in DOCUMENT_TASKS if mixture.weights.get(name)]
    if needy and not source.may_join and 2 * document < longest:
        raise LongspanError(
            f"{', '.join(needy)} in rows of {longest:,} tokens: a document of {longest // 2:,} is "
            f"needed, the longest has {document:,}; train on shorter rows, or --join-short")


def held_out_rows(data: Path) -> Batch:
    """Held-out text as rows of `HELD_OUT_LEN` tokens, from the beginnings of documents; shorter
    rows where there is less."""
    corpus = open_source(data, "held_out", True).corpus
    spans = [corpus.tokens[start : start + length] for start, length in corpus.spans()]
    length = min(HELD_OUT_LEN, sum(map(len, spans)))
    rows = [span[:length] for span in spans if len(span) >= length][-HELD_OUT_ROWS:]
    if not rows:
        joined = np.concatenate(spans)
        rows = [joined[at : at + length] for at in range(0, len(joined) - length + 1, length)]
    ids = torch.from_numpy(np.stack(rows[:HELD_OUT_ROWS]).astype(np.int32))
    return Batch(ids, torch.ones(ids.shape), torch.full(ids.shape, FILLER, dtype=torch.uint8))


def token_bytes(source: Source) -> tuple[int, ...]:
    """Bytes of each token."""
    return tuple(int(n) for n in source.table.num_bytes)


@contextmanager
def stopped_by_sigterm() -> Iterator[threading.Event]:
    """Return an event that SIGTERM sets."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


def finish(
    model: CausalLM, progress: Progress, phases: Sequence[Phase], base: Base, out: Path,
    world: World, extended: Phase | None = None,
) -> bool:
    """Draw the log and, where all phases are done, write the checkpoint; says what to do next."""
    is_done = progress.phase == len(phases)
    weights: Mapping[str, torch.Tensor] = whole_weights(model) if is_done else {}
    if world.is_first:
        draw_run(out / LOG_FILE, out / PLOT)
        if is_done:
            save_trained(model, dict(weights), base, out / MODEL, extended)
            note(f"done: {out / MODEL} is a checkpoint")
        else:
            note(f"stopped in phase {phases[progress.phase].name} after {progress.step} steps; "
                 "repeat the command to go on")
    world.barrier()
    return is_done


def default_workers() -> int:
    """Count the processes that make rows unless another number is asked for."""
    return max(0, (os.cpu_count() or 2) - 2)
