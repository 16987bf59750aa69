"""Many samples at a time, written in the order of the plan: what is done is never done again."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longspan.data.calls import Calls, UnansweredError
from longspan.data.instruct.asking import Asker
from longspan.data.instruct.checks import SAME_QUERY, Verdict, similarity
from longspan.data.instruct.job import Recipe, make_sample
from longspan.data.instruct.library import Library
from longspan.data.lines import Lines, dump
from longspan.data.ordered import in_order

DUPLICATE = "duplicate"

Job = tuple[str, int]
"""A name, and the document's place."""


def plan_jobs(library: Library, num_jobs: int, min_tokens: int, seed: int) -> list[Job]:
    """Return documents in random order, each once before any of them a second time."""
    places = library.long_enough(min_tokens)
    jobs: list[Job] = []
    for turn in range(-(-num_jobs // len(places))):
        order = random.Random(repr((seed, turn))).sample(places, len(places))
        jobs += [(f"{place}/{turn}", place) for place in order]
    return jobs[:num_jobs]


@dataclass(slots=True)
class Written:
    """The files of a run, and the queries in them."""

    samples: Lines
    rejected: Lines
    queries: list[str] = field(default_factory=list)

    def add(self, line: dict[str, Any]) -> bool:
        """Append a line to the file it belongs to; whether it is a sample."""
        if "rejected" not in line:
            query = line["provenance"]["query"]
            value = max((similarity(query, other) for other in self.queries), default=0.0)
            verdict = Verdict(DUPLICATE, value < SAME_QUERY, round(value, 3))
            line["provenance"]["verdicts"].append(verdict.as_json())
            if verdict.passed:
                self.queries.append(query)
            else:
                messages = line.pop("messages")
                line = {"rejected": DUPLICATE, "answer": messages[-1]["content"], **line}
        is_sample = "rejected" not in line
        (self.samples if is_sample else self.rejected).append(dump(line))
        return is_sample


@dataclass(slots=True)
class Outcome:
    """How a run ended."""

    num_samples: int = 0
    num_rejected: int = 0
    unanswered: list[str] = field(default_factory=list)
    """Why jobs are left for the next run."""


def run(
    jobs: Sequence[Job], library: Library, recipe: Recipe, calls: Calls, written: Written,
    concurrency: int, on_job: Callable[[], None] = lambda: None,
) -> Outcome:
    """Make the samples of jobs, ``concurrency`` at a time.

    Jobs that get no answer are left out; any other error ends the run, and nothing more is asked.
    """
    outcome = Outcome()

    def work(job: Job) -> dict[str, Any] | UnansweredError:
        try:
            # Jobs that draw one segment of a document shall not draw one query.
            seed = zlib.crc32(f"{recipe.seed} {job[0]}".encode()) >> 1
            return make_sample(library, recipe, Asker(calls, job[0], seed), job[1])
        except UnansweredError as error:
            return error

    for line in in_order(work, jobs, concurrency, calls.stop):
        if isinstance(line, UnansweredError):
            outcome.unanswered.append(str(line))
        elif written.add(line):
            outcome.num_samples += 1
        else:
            outcome.num_rejected += 1
        on_job()
    return outcome


def count_samples(
    samples: Iterable[Mapping[str, Any]], rejected: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Count what passed each filter and what did not, and samples by task."""
    filters: dict[str, dict[str, int]] = {}
    tasks: dict[str, dict[str, int]] = {}
    num_steps = 0
    for is_sample, lines in ((True, samples), (False, rejected)):
        for line in lines:
            task = tasks.setdefault(line["task"], {"samples": 0, "rejected": 0})
            task["samples" if is_sample else "rejected"] += 1
            num_steps += len(line["provenance"]["steps"])
            for verdict in line["provenance"]["verdicts"]:
                counts = filters.setdefault(verdict["filter"], {"passed": 0, "rejected": 0})
                counts["passed" if verdict["passed"] else "rejected"] += 1
    return {"num_samples": sum(task["samples"] for task in tasks.values()),
            "num_rejected": sum(task["rejected"] for task in tasks.values()),
            "num_calls": num_steps, "filters": filters, "tasks": dict(sorted(tasks.items()))}
