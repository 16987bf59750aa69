"""Runs a task over lengths and attention settings; one JSON line per question, resumable.

The order of work is: one haystack for every setting and length, then the further ones. A run that
is cut off has results everywhere, and starts again where it stopped.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspan.errors import LongspanError
from longspan.eval.niah import MAX_ANSWER_TOKENS, passkey_haystack, score_number, spread_depths
from longspan.eval.stats import wilson_interval
from longspan.eval.task import Answer, Example, Generate, TextBank, TextTokenizer

NUM_DEPTH_BINS = 10


@dataclass(frozen=True, slots=True)
class Setting:
    """How the model attends."""

    attention: str
    """``dense`` or ``sparse``."""
    positions: str
    """``rope``, ``dca`` or ``dca+yarn``."""

    @property
    def label(self) -> str:
        """As result rows name it: the positions, with ``sparse-`` before them if so."""
        return self.positions if self.attention == "dense" else f"sparse-{self.positions}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalPlan:
    """What to measure."""

    model: str
    lengths: tuple[int, ...]
    """Prompt lengths, tokens."""
    settings: tuple[Setting, ...]
    num_questions: int = 100
    """For each length and setting, over all haystacks."""
    num_haystacks: int = 5
    num_distractors: int = 5
    """Facts in each haystack that nobody asks for."""
    seed: int = 0
    task: str = "passkey"
    setup: str = ""
    """Fingerprint of texts, weights and engine options: samples of another one do not count."""

    def __post_init__(self) -> None:
        if self.num_haystacks < 1 or self.num_questions < self.num_haystacks:
            raise LongspanError(
                f"{self.num_questions} questions on {self.num_haystacks} haystacks: both must be "
                "positive, and at least one question on each haystack is needed")

    def questions_of(self, haystack: int) -> int:
        """Questions on one haystack: equal shares, earlier ones larger."""
        share, extra = divmod(self.num_questions, self.num_haystacks)
        return share + (haystack < extra)


@dataclass(frozen=True, slots=True)
class Cell:
    """One haystack with its questions in one setting."""

    setting: Setting
    num_tokens: int
    haystack: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One question and what came of it."""

    key: str
    """Identifies the question; a run takes samples with the same key as done."""
    model: str
    task: str
    num_tokens: int
    attention: str
    haystack: int
    depth: float
    position: int
    answer: str
    text: str
    score: float
    density: float | None
    ttft_s: float | None
    num_cached_tokens: int


class SampleFile:
    """Finished samples, one JSON object a line. A line cut short by a crash is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Sample]:
        """Samples by key."""
        if not self._path.is_file():
            return {}
        found = {}
        for line in self._path.read_text(encoding="utf-8").splitlines():
            sample = _parse(line)
            if sample is not None:
                found[sample.key] = sample
        return found

    def append(self, samples: Iterable[Sample]) -> None:
        """Write samples and flush."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        old = self._path.read_bytes() if self._path.is_file() else b""
        with self._path.open("a", encoding="utf-8") as file:
            if old and not old.endswith(b"\n"):
                file.write("\n")
            for sample in samples:
                file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")

    def clear(self) -> None:
        """Forget everything."""
        self._path.unlink(missing_ok=True)


OpenModel = Callable[[Setting], AbstractContextManager[Generate]]
OnCell = Callable[[Cell, Sequence[Sample]], None]


def run(
    plan: EvalPlan, tokenizer: TextTokenizer, bank: TextBank, open_model: OpenModel,
    samples: SampleFile, on_cell: OnCell | None = None,
) -> list[Sample]:
    """Ask every question that has no sample yet. Returns all samples of the plan.

    Args:
        open_model: loads the model for one setting; closed before the next one is opened.
        on_cell: called after each haystack, when its samples are written.
    """
    done = samples.read()
    for group in work_order(plan):
        missing = [cell for cell in group if _samples_of(plan, cell, done) is None]
        if not missing:
            continue
        with open_model(missing[0].setting) as generate:
            for cell in missing:
                new = _ask(plan, cell, tokenizer, bank, generate)
                samples.append(new)
                done.update((sample.key, sample) for sample in new)
                if on_cell is not None:
                    on_cell(cell, new)
    return finished(plan, done)


def finished(plan: EvalPlan, done: Mapping[str, Sample]) -> list[Sample]:
    """The plan's samples among those done, of whole haystacks only."""
    return [sample for group in work_order(plan) for cell in group
            for sample in _samples_of(plan, cell, done) or ()]


def work_order(plan: EvalPlan) -> Iterator[list[Cell]]:
    """Groups of cells with one setting each: first one haystack of every length."""
    for haystacks in (range(1), range(1, plan.num_haystacks)):
        for setting in plan.settings:
            yield [Cell(setting, num_tokens, haystack) for haystack in haystacks
                   for num_tokens in plan.lengths]


def build_cell(
    plan: EvalPlan, cell: Cell, tokenizer: TextTokenizer, bank: TextBank
) -> list[Example]:
    """The prompts of a cell. The seed depends on length and haystack only: all settings answer
    the same prompts."""
    rng = random.Random(f"{plan.task}:{cell.num_tokens}:{plan.seed}:{cell.haystack}")
    depths = spread_depths(plan.questions_of(cell.haystack), rng)
    return passkey_haystack(bank, tokenizer, num_tokens=cell.num_tokens, depths=depths, rng=rng,
                            num_distractors=plan.num_distractors)


def result_rows(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Scores by model, length and attention: over all depths (depth null) and by tenth of the
    document (depth: its middle). Shares from 0 to 1, with 95 % Wilson intervals."""
    groups: dict[tuple[Any, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        cell = (sample.model, sample.task, sample.num_tokens, sample.attention)
        part = min(int(sample.depth * NUM_DEPTH_BINS), NUM_DEPTH_BINS - 1)
        groups[(*cell, None)].append(sample)
        groups[(*cell, (part + 0.5) / NUM_DEPTH_BINS)].append(sample)
    return [_row(key, groups[key]) for key in sorted(groups, key=lambda k: (*k[:4], k[4] or 0.0))]


def _row(key: tuple[Any, ...], samples: Sequence[Sample]) -> dict[str, Any]:
    model, task, num_tokens, attention, depth = key
    num_right = sum(sample.score for sample in samples)
    low, high = wilson_interval(num_right, len(samples))
    # Follow-up questions compute a few tokens only: density is that of whole prefills.
    densities = [sample.density for sample in samples
                 if sample.density is not None and sample.num_cached_tokens == 0]
    return {
        "model": model, "task": task, "num_tokens": num_tokens, "depth": depth,
        "attention": attention, "n": len(samples),
        "num_haystacks": len({sample.haystack for sample in samples}),
        "score": num_right / len(samples), "ci_low": round(low, 4), "ci_high": round(high, 4),
        "density": round(sum(densities) / len(densities), 4) if densities else None,
    }


def _ask(
    plan: EvalPlan, cell: Cell, tokenizer: TextTokenizer, bank: TextBank, generate: Generate
) -> list[Sample]:
    examples = build_cell(plan, cell, tokenizer, bank)
    answers = generate([example.prompt_ids for example in examples], MAX_ANSWER_TOKENS)
    return [_sample(plan, cell, index, example, answer)
            for index, (example, answer) in enumerate(zip(examples, answers, strict=True))]


def _sample(plan: EvalPlan, cell: Cell, index: int, example: Example, answer: Answer) -> Sample:
    return Sample(
        key=_key(plan, cell, index), model=plan.model, task=plan.task, num_tokens=cell.num_tokens,
        attention=cell.setting.label, haystack=cell.haystack, depth=round(example.depth, 5),
        position=example.position, answer=example.answer, text=answer.text,
        score=score_number(answer.text, example.answer), density=answer.density,
        ttft_s=answer.ttft_s, num_cached_tokens=answer.num_cached_tokens)


def _samples_of(plan: EvalPlan, cell: Cell, done: Mapping[str, Sample]) -> list[Sample] | None:
    """The cell's samples, None unless all are there."""
    keys = [_key(plan, cell, index) for index in range(plan.questions_of(cell.haystack))]
    return [done[key] for key in keys] if all(key in done for key in keys) else None


def _key(plan: EvalPlan, cell: Cell, index: int) -> str:
    count = plan.questions_of(cell.haystack)
    return (f"{plan.task}/{plan.model}/{cell.num_tokens}/{cell.setting.label}/seed{plan.seed}/"
            f"h{cell.haystack}/q{index}of{count}+{plan.num_distractors}/{plan.setup}")


def _parse(line: str) -> Sample | None:
    try:
        return Sample(**json.loads(line))
    except (json.JSONDecodeError, TypeError):
        return None
