"""``longspan synth instruct``: long instructions, asked and answered by a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from longspan.commands.console import note, show_table
from longspan.commands.corpus import CorpusJob, claim, prepare_corpus, progress
from longspan.commands.speakers import open_speaker
from longspan.data.calls import Calls
from longspan.data.instruct.job import Recipe
from longspan.data.instruct.library import Library
from longspan.data.instruct.prompts import ALL, EXAMPLES, WISHES
from longspan.data.instruct.run import Job, Outcome, Written, count_samples, plan_jobs, run
from longspan.data.lines import Lines, read_lines
from longspan.errors import LongspanError
from longspan.eval.endpoint import EndpointConfig
from longspan.files.owned import owned_folder
from longspan.files.whole import replaced

SAMPLES, REJECTED, CALLS = (
    "instruct-train.jsonl", "instruct-rejected.jsonl", "instruct-calls.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class InstructJob:
    """What was asked for."""

    corpus: CorpusJob
    recipe: Recipe
    num_queries: int
    min_tokens: int
    model: str
    endpoint: EndpointConfig | None
    concurrency: int
    options: Mapping[str, Any]
    """Fields of `EngineConfig`, for a model in this process."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.recipe.weights) - set(WISHES))
        if unknown:
            raise LongspanError(f"no task named {unknown[0]}: choose from {', '.join(WISHES)}")

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt with its reply, about."""
        agent = self.recipe.agent
        reading = max(agent.part_len + agent.quote_len, self.recipe.segment_len + 256) + 256
        return max(reading, agent.longest_prompt)

    def identity(self, corpus: str) -> dict[str, Any]:
        """Return what all samples of a folder have in common; the number of queries may grow."""
        prompts = {prompt.label: hashlib.sha256(prompt.text.encode()).hexdigest()[:16]
                   for prompt in ALL}
        prompts["wishes"] = hashlib.sha256(repr((WISHES, EXAMPLES)).encode()).hexdigest()[:16]
        return {"corpus": corpus, "recipe": asdict(self.recipe), "min_tokens": self.min_tokens,
                "model": self.model, "prompts": prompts}


def make_instructions(job: InstructJob) -> int:
    """Write samples, rejected ones, replies and the card; go on after a cut.

    Returns the exit status: 1 when some queries got no answer.
    """
    with owned_folder(job.corpus.out):
        return _make_instructions(job)


def _make_instructions(job: InstructJob) -> int:
    meta = prepare_corpus(job.corpus)
    out = job.corpus.out
    library = Library(out)
    jobs = plan_jobs(library, job.num_queries, job.min_tokens, job.recipe.seed)
    identity = job.identity(meta["made_from"])
    claim(out / "instruct.json", identity)
    with Lines(out / SAMPLES) as samples, Lines(out / REJECTED) as rejected, \
            Lines(out / CALLS) as calls:
        done, queries = set[str](), []
        for name in (SAMPLES, REJECTED):
            for line in read_lines(out / name):
                done.add(line["provenance"]["job"])
                if name == SAMPLES:
                    queries.append(line["provenance"]["query"])
        missing = [each for each in jobs if each[0] not in done]
        outcome = _make(job, library, missing, Written(samples, rejected, queries), calls)
    _write_card(job, identity, meta)
    if outcome.unanswered:
        note(f"{len(outcome.unanswered):,} queries got no answer ({outcome.unanswered[0]}): run "
             "the same command again to go on")
    return 1 if outcome.unanswered else 0


def _make(
    job: InstructJob, library: Library, missing: list[Job], written: Written, lines: Lines
) -> Outcome:
    if not missing:
        note(f"{job.corpus.out}: nothing was left to do")
        return Outcome()
    names = {name for name, _ in missing}
    known = (row for row in read_lines(lines.path) if row["job"] in names)
    shorter = "ask for less by --evidence, --segment or --part"
    with open_speaker(job.model, job.endpoint, job.options, job.longest_prompt, shorter) as say, \
            progress("queries", len(missing)) as advance:
        calls = Calls(say, lines, known)
        return run(missing, library, job.recipe, calls, written, job.concurrency,
                   lambda: advance(1))


def _write_card(job: InstructJob, identity: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    out = job.corpus.out
    counts = count_samples(read_lines(out / SAMPLES), read_lines(out / REJECTED))
    card = {"made_by": "longspan synth instruct", **job.corpus.facts(), **identity,
            **{name: value for name, value in meta.items() if name != "documents"}, **counts}
    with replaced(out / "instruct-card.json") as part:
        part.write_text(json.dumps(card, indent=1, default=dict))
    show_table("queries", ("task", "samples", "rejected"), [
        (task, f"{found['samples']:,}", f"{found['rejected']:,}")
        for task, found in counts["tasks"].items()])
    show_table("filters", ("filter", "passed", "rejected"), [
        (name, f"{found['passed']:,}", f"{found['rejected']:,}")
        for name, found in counts["filters"].items()])
