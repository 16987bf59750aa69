"""``longspan train nano``: from raw text to the bundled model, piece by piece.

Each piece has a folder of its own and is whole or is gone on with: text to corpus, five phases,
practice, conversations, fine-tuning, pairs, preferences. A model goes from piece to piece as a
checkpoint, with a new optimizer, so pieces may run on different machines.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from longspan.commands import practice, synth_chat, train, tune
from longspan.commands.console import note
from longspan.commands.corpus import print_table, read_json
from longspan.commands.training import MODEL, Limits
from longspan.data.chat.rows import CHAT, PAIRS, ChatPlanner
from longspan.data.documents import Root
from longspan.errors import LongspanError
from longspan.files.owned import owned_folder
from longspan.files.whole import replaced_checkpoint
from longspan.recipes.recipe import Recipe
from longspan.train.export import split_shards
from longspan.train.phases import Phase, with_tokens
from longspan.train.state import STATE_FILE

PIECES = ("corpus", "pretrain", "practice", "sft", "dpo")


@dataclass(frozen=True, kw_only=True, slots=True)
class NanoJob:
    """What was asked for."""

    recipe: Recipe
    roots: Sequence[Root]
    out: Path
    num_tokens: Mapping[str, int]
    """Tokens of phases, by name, in place of the recipe's."""
    limits: Limits
    until: str = PIECES[-1]
    """The last piece to do."""
    base: Path | None = None
    """A pre-trained checkpoint in place of the phases."""
    shards: Path | None = None
    """Where the last piece is also exported in small files; pre-training's however far it came."""


def run(job: NanoJob) -> bool:
    """Do what is not done yet; True when the last piece asked for is done."""
    if job.until not in PIECES:
        raise LongspanError(f"--until {job.until}: choose from {', '.join(PIECES)}")
    with_tokens([*job.recipe.phases, *job.recipe.tuning.practice], job.num_tokens)
    with owned_folder(job.out):
        return _run(job)


def _run(job: NanoJob) -> bool:
    started = time.perf_counter()
    steps: dict[str, Callable[[float], bool]] = {
        "corpus": lambda left_s: _corpus(job),
        "pretrain": lambda left_s: _pretrain(job, left_s),
        "practice": lambda left_s: _practice(job, left_s),
        "sft": lambda left_s: _sft(job, left_s),
        "dpo": lambda left_s: _dpo(job, left_s)}
    for name in PIECES[: PIECES.index(job.until) + 1]:
        left_s = job.limits.time_limit_s - (time.perf_counter() - started)
        if left_s <= 0 or not steps[name](left_s):
            note(f"time was up in {name}: repeat the command to go on")
            return False
    last = job.out / job.until / MODEL
    if last.is_dir():
        _copy(last, job.out / MODEL)
        if job.shards:
            split_shards(job.out / MODEL, job.shards, train.SHARD_SIZE)
        note(f"done: {job.out / MODEL} is the model after {job.until}")
    return True


def _data(job: NanoJob) -> Path:
    return job.out / "data"


def _corpus(job: NanoJob) -> bool:
    meta = read_json(_data(job) / "corpus" / "meta.json")
    if meta is None:
        if not job.roots:
            raise LongspanError("no text: name it by --root DIR=MEGABYTES")
        print_table(train.make_corpus(job.recipe, job.roots, _data(job))["table"])
        return True
    corpus = train.corpus_job(job.recipe, job.roots, _data(job))
    if job.roots and meta.get("made_from") != corpus.identity:
        raise LongspanError(f"{_data(job)} was made from other text: repeat with the same --root, "
                            "or name a new folder")
    return True


def _pretrain(job: NanoJob, left_s: float) -> bool:
    folder = job.out / "pretrain"
    if (folder / MODEL / "config.json").is_file():
        return True
    if job.base is not None:
        if not (job.base / "config.json").is_file():
            raise LongspanError(f"{job.base} is no checkpoint: name what pre-training exported")
        _copy(job.base, folder / MODEL)
        return True
    is_done = train.train(job.recipe, train.TrainOptions(
        data=_data(job), out=folder, num_tokens=_tokens(job, job.recipe.phases),
        resume=(folder / STATE_FILE).exists(), eager=job.limits.eager,
        recompute=job.limits.recompute, deadline_s=left_s, num_workers=job.limits.num_workers,
        shards=job.shards))
    if is_done:
        train.export(job.recipe, _data(job), folder, folder / MODEL)
    return is_done


def _tokens(job: NanoJob, phases: Sequence[Phase]) -> dict[str, int]:
    """Tokens that were asked for, of some phases."""
    names = {phase.name for phase in phases}
    return {name: count for name, count in job.num_tokens.items() if name in names}


def _practice(job: NanoJob, left_s: float) -> bool:
    tuning, folder = job.recipe.tuning, job.out / "practice"
    if not tuning.practice or (folder / MODEL / "config.json").is_file():
        return True
    return practice.run(practice.PracticeRun(
        checkpoint=job.out / "pretrain" / MODEL, data=_data(job), out=folder,
        phases=tuple(with_tokens(tuning.practice, _tokens(job, tuning.practice))),
        kind_weights=tuning.practice_weights, warmup_steps=tuning.practice_warmup,
        gate_documents=job.recipe.gate_documents, gate_needles=job.recipe.gate_needles,
        limits=replace(job.limits, time_limit_s=left_s)))


def _rows(job: NanoJob, name: str, form: str, counts: Mapping[int, int], seed: int) -> Path:
    """Rows of a form over the corpus, written once, in a folder of their own."""
    folder = job.out / name
    data = _data(job)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("corpus", "tokenizer"):
        if not (folder / part).exists():
            (folder / part).symlink_to((data / part).resolve(), target_is_directory=True)
    corpus = train.corpus_job(job.recipe, job.roots, folder)
    meta = read_json(folder / "corpus" / "meta.json")
    assert meta is not None, "the corpus is the first piece"
    synth_chat.make_rows(synth_chat.ChatJob(
        corpus=corpus, planner=ChatPlanner(form=form, num_rows=counts, seed=seed),
        num_workers=max(1, job.limits.num_workers)), meta)
    return folder / f"{form}-train.jsonl"


def _limits(job: NanoJob, begin: float, left_s: float) -> Limits:
    spent = time.perf_counter() - begin
    return Limits(time_limit_s=max(1e-3, left_s - spent), eager=job.limits.eager,
                  recompute=job.limits.recompute, rows_at_once=job.limits.rows_at_once)


def _sft(job: NanoJob, left_s: float) -> bool:
    folder, tuning, begin = job.out / "sft", job.recipe.tuning, time.perf_counter()
    if (folder / MODEL / "config.json").is_file():
        return True
    short = _rows(job, "chat-short", CHAT, tuning.short_rows, 1)
    mixed = _rows(job, "chat-mixed", CHAT, tuning.mixed_rows, 2)
    before = "practice" if tuning.practice else "pretrain"
    return tune.sft(tune.SftRun(
        checkpoint=job.out / before / MODEL, out=folder, learning_rate=tuning.sft_rate,
        tokens_per_step=tuning.tokens_per_step, limits=_limits(job, begin, left_s), stages=(
            tune.Stage(name="stage 1", files=(short,), max_length=32_768),
            tune.Stage(name="stage 2", files=(mixed,), max_length=262_144))))


def _dpo(job: NanoJob, left_s: float) -> bool:
    folder, tuning, begin = job.out / "dpo", job.recipe.tuning, time.perf_counter()
    if (folder / MODEL / "config.json").is_file():
        return True
    pairs = _rows(job, "pairs", PAIRS, tuning.pairs, 3)
    return tune.dpo(tune.DpoRun(
        checkpoint=job.out / "sft" / MODEL, files=(pairs,), out=folder,
        learning_rate=tuning.dpo_rate, tokens_per_step=tuning.tokens_per_step // 2,
        limits=_limits(job, begin, left_s)))


def _copy(checkpoint: Path, out: Path) -> None:
    with replaced_checkpoint(out) as folder:
        for file in checkpoint.iterdir():
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
