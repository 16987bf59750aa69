"""Runs tasks over lengths; knows neither tasks nor models. What is done is never asked again.

The order of work is: the first document of every task and length, then the second ones. A run that
is cut off has results everywhere, and goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

from longspan.errors import LongspanError
from longspan.eval.answer_nll import answer_nlls
from longspan.eval.prompt import Materials, TooShortError
from longspan.eval.samples import RunFolder, Sample
from longspan.eval.task import Answer, Example, Model, Task, rng_for

MAX_CHECKED_TOKENS = 32_768
"""The first prompt of each task and length is checked against its text up to this length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to measure. Every task is asked `num_samples` questions at each length; of documents
    that hold several questions as many as are needed, all of them full."""

    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    """Tokens of the longest prompt with its answer."""
    num_samples: int = 20
    seed: int = 0
    answer_nll: bool = False
    """Also score the right answer to each prompt; see `longspan.eval.answer_nll`."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise LongspanError(f"{self.num_samples} samples: at least one is needed")
        if not self.lengths and any(task.is_sized for task in self.tasks):
            raise LongspanError("no length was named; say for example --lengths 4k,32k")


@dataclass(frozen=True, slots=True)
class Job:
    """One document of one cell."""

    task: Task
    num_tokens: int
    """0 where the length is that of the data."""
    index: int

    def key(self, seed: int, question: int) -> str:
        """Return the key of one question about the document."""
        length = self.num_tokens or "data"
        rest = f"/q{question}" if self.task.num_questions > 1 else ""
        return f"{self.task.name}/{length}/seed{seed}/{self.index}{rest}"

    def keys(self, seed: int) -> list[str]:
        """Return the keys of all questions about the document."""
        return [self.key(seed, question) for question in range(self.task.num_questions)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    num_new: int
    num_failed: int
    is_stopped: bool
    """The time limit came before the end."""


OnJob = Callable[[Job, Sequence[Sample]], None]


def work_order(plan: Plan, materials: Materials) -> Iterator[Job]:
    """Yield all documents: the first of every cell, then the second ones."""
    cells = [(task, length, task.num_documents(plan.num_samples, materials))
             for task in plan.tasks for length in (plan.lengths if task.is_sized else (0,))]
    for index in range(max((count for *_, count in cells), default=0)):
        yield from (Job(task, length, index) for task, length, count in cells if index < count)


def run(
    plan: Plan, materials: Materials, model: Model, folder: RunFolder, *, concurrency: int = 1,
    time_limit_s: float | None = None, is_timed: bool = True, on_job: OnJob | None = None,
) -> Outcome:
    """Ask every question that has no answer yet, `concurrency` documents at a time.

    Times are kept only where they say something about the model: `is_timed`, and one document at a
    time.

    A prompt without an answer is kept as failed, and asked again by the next run. Errors end the
    run; answers that are under way are still waited for and kept.
    """
    done = {key for key, sample in folder.read().items() if sample.status == "ok"}
    jobs = [job for job in work_order(plan, materials)
            if not done.issuperset(job.keys(plan.seed))]
    num_done = num_new = num_failed = 0

    def work(job: Job) -> list[Sample]:
        samples = _ask(plan, job, materials, model, done)
        if not is_timed or concurrency > 1:
            samples = [replace(sample, ttft_s=None, total_s=None) for sample in samples]
        folder.append(samples)
        return samples

    for job, samples in _each(work, _until(jobs, time_limit_s), concurrency):
        num_done += 1
        num_new += len(samples)
        num_failed += sum(sample.status != "ok" for sample in samples)
        if on_job is not None:
            on_job(job, samples)
    return Outcome(num_new, num_failed, num_done < len(jobs))


def _until(jobs: Sequence[Job], time_limit_s: float | None) -> Iterator[Job]:
    """Yield the jobs that are begun before the time is over."""
    start = time.monotonic()
    for job in jobs:
        if time_limit_s is not None and time.monotonic() - start >= time_limit_s:
            return
        yield job


def _each(
    work: Callable[[Job], list[Sample]], jobs: Iterator[Job], concurrency: int
) -> Iterator[tuple[Job, list[Sample]]]:
    """Yield jobs with their samples, as they are finished. One at a time they run in this thread,
    where an interrupt reaches them."""
    if concurrency == 1:
        yield from ((job, work(job)) for job in jobs)
        return
    with ThreadPoolExecutor(concurrency) as pool:
        running: dict[Future[list[Sample]], Job] = {}
        for job in jobs:
            running[pool.submit(work, job)] = job
            if len(running) == concurrency:
                yield from _finished(running)
        while running:
            yield from _finished(running)


def _finished(
    running: dict[Future[list[Sample]], Job]
) -> Iterator[tuple[Job, list[Sample]]]:
    """Wait for at least one job; take those that are finished out."""
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in finished:
        yield running.pop(future), future.result()


def build(plan: Plan, job: Job, materials: Materials) -> list[Example]:
    """Build the examples of a document. They depend on task, length, seed and index alone, so that
    all models and settings answer the same prompts. Raises `LongspanError` if the length is too
    short."""
    rng = rng_for(job.task, job.num_tokens, plan.seed, job.index)
    try:
        examples = job.task.build(materials, job.num_tokens, job.index, rng)
    except TooShortError as error:
        raise LongspanError(
            f"{job.task.name}: {job.num_tokens:,} tokens, answer included, are too short for "
            f"{error.what}; at least {job.num_tokens + error.missing:,} are needed") from error
    assert len(examples) == job.task.num_questions
    if job.index == 0 and len(examples[0].prompt.ids) <= MAX_CHECKED_TOKENS:
        examples[0].prompt.check(materials.encoder)
    return examples


def _ask(
    plan: Plan, job: Job, materials: Materials, model: Model, done: set[str]
) -> list[Sample]:
    """Ask the questions about a document that are not answered yet; returns their samples."""
    examples = {key: example for key, example in
                zip(job.keys(plan.seed), build(plan, job, materials), strict=True)
                if key not in done}
    start = time.monotonic()
    answers = job.task.ask(model, list(examples.values()))
    total_s = round((time.monotonic() - start) / len(examples), 3)
    nlls: Sequence[float | None] = [None] * len(examples)
    if plan.answer_nll:
        nlls = _answer_nlls(job.task, list(examples.values()), model, materials)
    return [replace(_sample(key, job, example, answer, total_s), answer_nll=nll)
            for (key, example), answer, nll in zip(examples.items(), answers, nlls, strict=True)]


def _answer_nlls(
    task: Task, examples: Sequence[Example], model: Model, materials: Materials
) -> list[float | None]:
    """Score right answers. Raises `LongspanError` where the model gives no log-probabilities."""
    if model.score is None:
        raise LongspanError("--answer-nll needs log-probabilities of the prompt, which this model "
                            "does not give; leave it out")
    return answer_nlls(task, examples, model.score, materials.encoder)


def _sample(key: str, job: Job, example: Example, answer: Answer, total_s: float) -> Sample:
    """Make the sample of an example, scored if there is an answer."""
    common = {
        "key": key, "task": job.task.name, "num_tokens": job.num_tokens or None,
        "index": job.index, "prompt_tokens": len(example.prompt.ids),
        "ids_sha256": example.prompt.sha256, "positions": example.positions,
        "answers": example.gold.answers, "facts": example.gold.facts, "form": example.form}
    if answer.status != "ok":
        return Sample(**common, status=answer.status, error=answer.error)  # type: ignore[arg-type]
    verdict = job.task.score(example.gold, answer)
    return Sample(
        **common, text=answer.text, score=verdict.score, hits=verdict.hits,  # type: ignore[arg-type]
        label=verdict.label, values=verdict.values, density=answer.density, ttft_s=answer.ttft_s,
        total_s=total_s, num_cached_tokens=answer.num_cached_tokens)


def rescore(samples: Mapping[str, Sample], tasks: Mapping[str, Task]) -> dict[str, Sample]:
    """Give samples the verdicts that today's scorers give their texts; figures that no text holds
    stay as they are. Raises `LongspanError` for a task that there no longer is."""
    return {key: _rescored(sample, tasks) for key, sample in samples.items()}


def _rescored(sample: Sample, tasks: Mapping[str, Task]) -> Sample:
    if sample.task not in tasks:
        raise LongspanError(f"{sample.key}: no task is called {sample.task!r}; the samples were "
                            "written by another version")
    task = tasks[sample.task]
    if sample.status != "ok" or not task.scores_text:
        return sample
    verdict = task.score(sample.gold, Answer(text=sample.text))
    return replace(sample, score=verdict.score, hits=verdict.hits, label=verdict.label,
                   values=verdict.values)
