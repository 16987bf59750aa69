"""``longspan synth pairs --model``: pairs out of a model's own wrong answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from longspan.commands.console import note, show_table
from longspan.commands.corpus import CorpusJob, claim, open_source, prepare_corpus, progress
from longspan.commands.speakers import open_speaker
from longspan.commands.synth_chat import SPLITS, write_card
from longspan.data.calls import Calls, Say, UnansweredError
from longspan.data.chat.rows import ChatPlanner
from longspan.data.chat.sampled import Sampling, job_name, sample_pair
from longspan.data.lines import Lines, dump, read_lines
from longspan.data.ordered import in_order
from longspan.eval.endpoint import EndpointConfig
from longspan.files.owned import owned_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledJob:
    """What was asked for."""

    corpus: CorpusJob
    planner: ChatPlanner
    sampling: Sampling
    model: str
    endpoint: EndpointConfig | None
    concurrency: int
    options: Mapping[str, Any]
    """Fields of `EngineConfig`, for a model in this process."""


def sample_pairs(job: SampledJob) -> int:
    """Write ``pairs-SPLIT.jsonl``, and what was answered right; go on after a cut.

    Returns the exit status: 1 when some questions got no answer.
    """
    with owned_folder(job.corpus.out):
        return _sample_pairs(job)


def _sample_pairs(job: SampledJob) -> int:
    meta = prepare_corpus(job.corpus)
    out = job.corpus.out
    facts = {"seed": job.planner.seed, "model": job.model, "sampling": asdict(job.sampling)}
    claim(out / "pairs.json", {**asdict(job.planner), **facts, "corpus": meta["made_from"]})
    longest = max(job.planner.num_rows) + job.sampling.max_tokens
    unanswered: list[str] = []
    with open_speaker(job.model, job.endpoint, job.options, longest,
                      "ask for shorter --rows") as say:
        for split in SPLITS:
            seeds = job.planner.seeds(split, meta["num_held_out_tokens"])
            if seeds:
                unanswered += _sample_split(job, say, split, seeds)
    _show_right(job)
    write_card(job.corpus, "pairs", facts, meta)
    if unanswered:
        note(f"{len(unanswered):,} questions got no answer ({unanswered[0]}): run the same command "
             "again to go on")
    return 1 if unanswered else 0


def _sample_split(
    job: SampledJob, say: Say, split: str, seeds: list[tuple[int, int]]
) -> list[str]:
    """Ask about the rows that are not done; returns why some got no answer."""
    out, source = job.corpus.out, open_source(job.corpus.out, split, True)
    unanswered = []
    with Lines(out / f"pairs-{split}.jsonl") as pairs, \
            Lines(out / f"pairs-{split}-right.jsonl") as right, \
            Lines(out / f"pairs-{split}-calls.jsonl") as lines:
        done = {row["job"] for file in (pairs, right) for row in read_lines(file.path)}
        missing = [seed for seed in seeds if job_name(split, seed) not in done]
        names = {job_name(split, seed) for seed in missing}
        calls = Calls(say, lines, (c for c in read_lines(lines.path) if c["job"] in names))

        def work(seed: tuple[int, int]) -> dict[str, Any] | UnansweredError:
            try:
                return sample_pair(job.planner, source, calls, job.sampling, seed)
            except UnansweredError as error:
                return error

        with progress(split, len(missing)) as advance:
            for row in in_order(work, missing, job.concurrency, calls.stop):
                advance(1)
                if isinstance(row, UnansweredError):
                    unanswered.append(str(row))
                else:
                    (right if "right" in row else pairs).append(dump(row))
    return unanswered


def _show_right(job: SampledJob) -> None:
    """Print how many questions the model never answered wrong."""
    right = Counter(row["task"] for split in SPLITS
                    for row in read_lines(job.corpus.out / f"pairs-{split}-right.jsonl"))
    if right:
        show_table(f"no wrong answer of {job.model} in {job.sampling.num_tries}",
                   ("task", "questions"), sorted(right.items()))
