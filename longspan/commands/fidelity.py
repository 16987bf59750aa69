"""`longspan eval fidelity`: how near sparse attention comes to dense, in numbers that scores hide.

Texts are the tasks' own prompts, with the right answer behind them. Dense attention reads each
once, and its distributions at a few thousand positions are kept; every other arm reads the same
text and is compared while it does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from longspan.attention.head_errors import HeadErrors
from longspan.commands.console import PrefillBar, note, percent, show_table
from longspan.commands.models import ModelJob, Setting, check_lengths, open_llm, settings
from longspan.commands.prompts import PromptsJob, gather, held_out
from longspan.commands.results import describe_run, write_rows
from longspan.config import EngineConfig
from longspan.engine.front.llm import LLM
from longspan.engine.request import RequestOutput, SamplingParams
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.errors import LongspanError
from longspan.eval.answer_nll import with_answer
from longspan.eval.fidelity import TextFidelity, chosen_positions, fidelity_rows
from longspan.eval.prompt import Materials, Prompt
from longspan.eval.runner import Plan, build, work_order
from longspan.units import in_gib

FLOOR = "floor"
MEMORY_SHARE = 0.5
"""How much of the host's free memory the kept distributions may take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelityJob:
    """What is compared."""

    prompts: PromptsJob
    model: ModelJob
    """Its ``attention``: the arms beside dense."""
    num_positions: int
    """At which distributions are compared, of each text."""
    every: int
    """One query tile of so many is attended to densely for recall and output errors."""
    out: Path
    time_limit_s: float | None = None
    kv_dtype: str | None = None
    """Dense attention over keys and values of this type is an arm too."""

    def __post_init__(self) -> None:
        if "dense" in self.model.attention:
            raise LongspanError("--attention: dense is what all are compared with; name sparse, "
                                "paper or both")
        if self.num_positions < 2 or self.every < 1:
            raise LongspanError(f"{self.num_positions} positions, one tile of {self.every}: at "
                                "least 2 positions and one tile of 1 are needed")


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt with its right answer, and what dense attention made of it."""

    task: str
    num_tokens: int
    index: int
    prompt: Prompt
    answer_len: int
    positions: np.ndarray


@dataclass(slots=True)
class Reading:
    """What an arm made of a text."""

    nats: np.ndarray
    logprobs: Tensor | None
    """[R, V] on the host, of the reference alone."""
    kl: np.ndarray
    agrees: np.ndarray
    density: float | None
    heads: HeadErrors


@dataclass(slots=True)
class LogitWatch:
    """Takes the distributions at chosen positions from the logits that go by; beside a reference
    it keeps only how far they are from it."""

    positions: np.ndarray
    reference: Tensor | None
    logprobs: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)

    def __call__(self, first: int, logits: Tensor) -> None:
        """Take in the rows that predict the tokens from ``first`` on. logits: [n, V] fp32."""
        start, stop = np.searchsorted(self.positions, [first, first + len(logits)])
        if start == stop:
            return
        rows = torch.from_numpy(self.positions[start:stop] - first).to(logits.device)
        found = logits[rows].log_softmax(-1)
        if self.reference is None:
            self.logprobs.append(found.cpu())
            return
        wanted = self.reference[start:stop].to(logits.device)
        self.agrees.append((wanted.argmax(-1) == found.argmax(-1)).cpu())
        self.kl.append((wanted.exp() * (wanted - found)).sum(-1).cpu())


def run(job: FidelityJob) -> Path:
    """Compare every arm, write rows as arms are complete, show them. Returns the result file."""
    deadline = None if job.time_limit_s is None else time.monotonic() + job.time_limit_s
    arms = settings(job.model)
    check_lengths(job.model, job.prompts.plan.lengths)
    materials, about = gather(job.prompts)
    texts = gather_texts(job.prompts.plan, materials, job.num_positions)
    longest = max(len(text.prompt.ids) for text in texts)
    columns = {"haystack": about["haystack"],
               "held_out": held_out(job.prompts, job.model.model)}
    written: list[dict[str, Any]] = []
    file: Path | None = None
    for positions in dict.fromkeys(arm.positions for arm in arms):
        dense = Setting("dense", positions)
        references, where = _read_all(job, dense, texts, longest, None, deadline)
        compared: list[tuple[str, Setting, Mapping[str, Any]]] = [
            (f"{positions} {FLOOR}", dense, _other_chunking(job.model, longest))]
        if job.kv_dtype is not None:
            compared.append(
                (f"{positions} {job.kv_dtype} KV", dense, {"kv_dtype": job.kv_dtype}))
        compared += [(arm.label, arm, {}) for arm in arms if arm.positions == positions]
        for label, setting, options in compared:
            readings, where = _read_all(job, setting, texts[:len(references)], longest, references,
                                        deadline, options)
            found = [_compared(label, text, reading, reference, columns)
                     for text, reading, reference in zip(texts, readings, references, strict=False)]
            rows = fidelity_rows(job.model.shown_name, found)
            written += rows
            if rows:
                file = write_rows(job.out, "fidelity", rows, about=where)
    if file is None:
        raise LongspanError("the time limit came before one text was compared; raise it, or ask "
                            "for shorter texts")
    show(written)
    return file


def gather_texts(plan: Plan, materials: Materials, num_positions: int) -> list[Text]:
    """Build the texts: of each document the first question, with its answer."""
    texts = []
    for work in work_order(plan, materials):
        example = build(plan, work, materials)[0]
        answered = with_answer(work.task, example, materials.encoder)
        prompt = example.prompt if answered is None else answered
        answer_len = len(prompt.ids) - len(example.prompt.ids)
        texts.append(Text(
            work.task.name, work.num_tokens or len(prompt.ids), work.index, prompt, answer_len,
            chosen_positions(len(prompt.ids), num_positions, answer_len)))
    return texts


def _read_all(
    job: FidelityJob, setting: Setting, texts: Sequence[Text], longest: int,
    references: Sequence[Reading] | None, deadline: float | None,
    options: Mapping[str, Any] | None = None,
) -> tuple[list[Reading], dict[str, Any]]:
    """Read the texts in one setting, until time is over."""
    found: list[Reading] = []
    with open_llm(job.model, setting, longest, options) as llm:
        if references is None:
            _check_memory(texts, llm.model_config.vocab_size)
        for number, text in enumerate(texts):
            if deadline is not None and time.monotonic() > deadline:
                note(f"stopped by the time limit: {setting.label} has read {number} of "
                     f"{len(texts)} texts")
                break
            reference = None if references is None else references[number]
            found.append(read(llm, text, reference, job.every))
            note(f"{setting.label:<16} {text.task:<16} {len(text.prompt.ids):>9,} tokens  "
                 f"#{text.index}  {found[-1].nats.mean():.4f} nats a token" + (
                     "" if reference is None else f", KL {found[-1].kl.mean():.3g}"))
        return found, describe_run(str(llm.config.device))


def read(llm: LLM, text: Text, reference: Reading | None, every: int) -> Reading:
    """Read one text. Raises `LongspanError` when memory runs out."""
    heads = HeadErrors(every=every, with_errors=True)
    watch = LogitWatch(text.positions, None if reference is None else reference.logprobs)
    llm.observe(heads)
    llm.watch_logits(watch)
    try:
        with PrefillBar() as bar:
            output = llm.generate(
                [text.prompt.ids], SamplingParams(max_tokens=0, prompt_logprobs=0), bar.update)[0]
    except torch.OutOfMemoryError:
        raise LongspanError(
            f"memory ran out at {len(text.prompt.ids):,} tokens; lower --memory-gib, which leaves "
            "more beside the engine, or --prefill-chunk-len") from None
    finally:
        llm.observe(None)
        llm.watch_logits(None)
    return _reading(output, watch, heads)


def _reading(output: RequestOutput, watch: LogitWatch, heads: HeadErrors) -> Reading:
    assert output.prompt_logprobs is not None
    nats = -output.prompt_logprobs[1:].astype(np.float64)
    if watch.reference is None:
        nothing = np.zeros(0)
        return Reading(nats, torch.cat(watch.logprobs), nothing, nothing, output.density, heads)
    return Reading(nats, None, torch.cat(watch.kl).double().numpy(),
                   torch.cat(watch.agrees).numpy(), output.density, heads)


def _compared(
    label: str, text: Text, reading: Reading, reference: Reading, columns: Mapping[str, Any]
) -> TextFidelity:
    return TextFidelity(
        task=text.task, num_tokens=text.num_tokens, index=text.index, attention=label,
        nats=reading.nats, dense_nats=reference.nats, kl=reading.kl, agrees=reading.agrees,
        answer_len=text.answer_len, density=reading.density, recalls=reading.heads.recalls(),
        errors=reading.heads.errors(), about=columns)


def _other_chunking(job: ModelJob, longest: int) -> dict[str, Any]:
    """Return the engine options of the floor: prefill chunks of half the length, or of half the
    longest text where that is shorter."""
    config = ResolvedEngine.resolve(EngineConfig(
        model=job.model, attention="dense", max_model_len=longest, **job.options)).config
    chunk_len, block_size = config.prefill_chunk_len, config.block_size
    assert chunk_len is not None
    half = min(chunk_len, longest) // 2 // block_size * block_size
    return {"prefill_chunk_len": max(block_size, half)}


def _check_memory(texts: Sequence[Text], vocab_size: int) -> None:
    """Raise `LongspanError` if the reference's distributions do not fit the host."""
    needed = 4 * vocab_size * sum(len(text.positions) for text in texts)
    free = MEMORY_SHARE * psutil.virtual_memory().available
    if needed > free:
        raise LongspanError(
            f"the distributions of {len(texts)} texts take {in_gib(needed)}, {in_gib(int(free))} "
            "of memory are free for them; compare fewer --compared-positions, or fewer texts (-n)")


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table for each length and arm on stdout, then the worst of each."""
    cells: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["num_tokens"], row["attention"]), []).append(row)
    for (length, attention), each in sorted(cells.items()):
        show_table(f"{attention} beside dense, {length:,} tokens", (
            "task", "n", "KL, nats", "95 % interval", "p99", "max", "top-1", "nats more",
            "95 % interval", "recall", "output error", "density"), [
            (row["task"], row["n"], f"{row['kl']:.2g}", _interval(row, "kl"),
             f"{row['kl_p99']:.2g}", f"{row['kl_max']:.2g}", percent(row["top1"]),
             f"{row['nats_more']:.2g}", _interval(row, "nats_more"), percent(row.get("recall")),
             percent(row.get("output_error")), percent(row["density"])) for row in each])
    worst = [each[-1] for each in cells.values() if "worst_head" in each[-1]]
    if worst:
        show_table("the worst", ("tokens", "attention", "task", "its KL", "layer, head",
                                 "its recall", "its output error"), [
            (f"{row['num_tokens']:,}", row["attention"], _worst_task(row)["task"],
             f"{_worst_task(row)['kl']:.2g}",
             f"{row['worst_head']['layer']}, {row['worst_head']['head']}",
             percent(row["worst_head"]["recall"]), percent(row["worst_head"]["output_error"]))
            for row in worst])


def _worst_task(row: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = row.get("worst_task", row)
    return found


def _interval(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "-" if low is None else f"{low:.2g} to {high:.2g}"
