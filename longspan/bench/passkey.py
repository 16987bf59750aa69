"""`longspan eval passkey`: the passkey task of `longspan.eval` on our engine."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.commands.console import PrefillBar, note, percent, seconds, show_table
from longspan.commands.info import position_label
from longspan.commands.results import write_rows
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.front.llm import LLM
from longspan.engine.request import RequestOutput, SamplingParams
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import LongspanError
from longspan.eval.niah import MAX_ANSWER_TOKENS
from longspan.eval.runner import (
    Cell,
    EvalPlan,
    Sample,
    SampleFile,
    Setting,
    finished,
    result_rows,
)
from longspan.eval.runner import run as run_plan
from longspan.eval.task import Answer, Generate, TextBank, python_text_roots
from longspan.model.weights import resolve_checkpoint

HASHED_BYTES = 2**22


@dataclass(frozen=True, kw_only=True, slots=True)
class PasskeyJob:
    """What was asked for on the command line."""

    model: str
    name: str | None
    lengths: tuple[int, ...]
    attention: tuple[str, ...]
    positions: tuple[str, ...]
    num_questions: int
    num_haystacks: int
    num_distractors: int
    seed: int
    text_roots: tuple[Path, ...]
    out: Path
    resume: bool


def run(job: PasskeyJob, options: dict[str, Any]) -> None:
    """Measure, write the rows after every haystack, and print the table."""
    path = resolve_checkpoint(job.model)
    tokenizer = Tokenizer(path)
    bank = TextBank.from_roots(job.text_roots or python_text_roots(), tokenizer)
    name = job.name or Path(job.model).name
    plan = EvalPlan(
        model=name, lengths=job.lengths, settings=_settings(job, ModelConfig.from_dir(path)),
        num_questions=job.num_questions, num_haystacks=min(job.num_haystacks, job.num_questions),
        num_distractors=job.num_distractors, seed=job.seed, setup=fingerprint(path, bank, options))
    samples = SampleFile(job.out / "samples" / f"passkey.{name}.jsonl")
    if not job.resume:
        samples.clear()
    device, files = [""], list[Path]()

    @contextmanager
    def open_model(setting: Setting) -> Iterator[Generate]:
        with LLM(job.model, attention=setting.attention, positions=setting.positions,
                 max_model_len=max(job.lengths) + MAX_ANSWER_TOKENS, **options) as llm:
            device[0] = str(llm.config.device)
            yield EngineGenerate(llm)

    def on_cell(cell: Cell, new: Sequence[Sample]) -> None:
        rows = result_rows(finished(plan, samples.read()))
        files.append(write_rows(job.out, "eval", rows, device[0]))
        num_right = sum(sample.score for sample in new)
        note(f"{cell.num_tokens:>9,} tokens  {cell.setting.label:<16} haystack "
             f"{cell.haystack + 1}/{plan.num_haystacks}  {num_right:.0f}/{len(new)} right, first "
             f"token after {seconds(new[0].ttft_s)}, density {percent(new[0].density)}")

    show_rows(result_rows(run_plan(plan, tokenizer, bank, open_model, samples, on_cell)))
    note(f"rows in {files[-1]}" if files else "nothing was left to do")


class EngineGenerate:
    """`Generate` by our engine. The first prompt of a haystack runs alone: the others then find
    its document in the prefix cache."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def __call__(self, prompts: Sequence[array[int]], max_tokens: int) -> list[Answer]:
        params = SamplingParams(max_tokens=max_tokens)
        with PrefillBar() as bar:
            outputs = self._llm.generate([prompts[0]], params, bar.update)
        if len(prompts) > 1:
            outputs += self._llm.generate(list(prompts[1:]), params)
        return [_answer(output) for output in outputs]


def fingerprint(path: Path, bank: TextBank, options: Mapping[str, Any]) -> str:
    """Of everything that answers depend on besides the plan. Weights count with their size and
    their end: hashing all of a large checkpoint would take minutes."""
    engine = {name: value for name, value in options.items() if name != "num_threads"}
    found = hashlib.sha256(json.dumps([bank.fingerprint, engine], sort_keys=True).encode())
    for file in sorted([*path.glob("*.json"), *path.glob("*.safetensors")]):
        with file.open("rb") as data:
            size = data.seek(0, 2)
            data.seek(max(0, size - HASHED_BYTES))
            found.update(f"{file.name} {size}".encode() + data.read())
    return found.hexdigest()[:16]


def show_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Scores over all depths, as a table on stdout."""
    show_table("passkey", ("model", "tokens", "attention", "right", "95 % interval", "n",
                           "haystacks", "density"), [
        (row["model"], f"{row['num_tokens']:,}", row["attention"], percent(row["score"]),
         f"{100 * row['ci_low']:.1f}-{100 * row['ci_high']:.1f}", row["n"], row["num_haystacks"],
         percent(row["density"]))
        for row in rows if row["depth"] is None])


def _settings(job: PasskeyJob, model: ModelConfig) -> tuple[Setting, ...]:
    for attention in job.attention:
        if attention not in ("dense", "sparse"):
            raise LongspanError(f"--attention: {attention!r} is not one of dense, sparse")
    for positions in job.positions:
        if positions not in ("auto", "rope", "dca", "dca+yarn"):
            raise LongspanError(
                f"--positions: {positions!r} is not one of auto, rope, dca, dca+yarn")
    labels = [position_label(EngineConfig(model=job.model, positions=positions), model)  # type: ignore[arg-type]
              for positions in job.positions]
    return tuple(dict.fromkeys(Setting(a, p) for p in labels for a in job.attention))


def _answer(output: RequestOutput) -> Answer:
    return Answer(text=output.text, num_cached_tokens=output.num_cached_tokens,
                  density=output.density, ttft_s=output.ttft_s)
