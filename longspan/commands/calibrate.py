"""`longspan calibrate`: budgets of a model's heads, measured on long texts by the engine itself."""

from __future__ import annotations

import datetime
import json
import os
import random
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longspan.attention.calibrate import (
    SEARCH_LEN,
    Calibrator,
    Tally,
    achieved,
    best_candidates,
    candidates,
    check_threshold,
    ladder,
    refined,
)
from longspan.attention.sparsity import MOST, SparsityPlan
from longspan.commands.calibration_report import draw_map, show_heads
from longspan.commands.console import PrefillBar, note
from longspan.config import ModelConfig, read_json
from longspan.engine.front.llm import LLM
from longspan.engine.request import Progress, SamplingParams
from longspan.errors import LongspanError, MissingDependencyError
from longspan.eval.text import TextBank, python_text_roots
from longspan.model.fingerprint import weights_fingerprint
from longspan.model.weights import resolve_checkpoint

SCORED = SamplingParams(max_tokens=0, prompt_logprobs=0)
"""Every row is computed in every layer, the last one too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateJob:
    """What to calibrate, and on what. Raises `LongspanError` for numbers out of range."""

    model: str
    out: Path
    length: int
    """Tokens of each text."""
    recall: float
    num_texts: int = 1
    seed: int = 0
    text_roots: tuple[Path, ...] = ()
    """Folders of text; none: Python's own library."""

    def __post_init__(self) -> None:
        check_threshold(self.recall)
        if self.num_texts < 1:
            raise LongspanError(f"--texts is {self.num_texts}; at least 1 is needed")
        if self.length < 1024 or self.length % 128:
            raise LongspanError(f"--length is {self.length}; a multiple of 128 from 1,024 on is "
                                "needed")


def run(job: CalibrateJob, options: dict[str, Any]) -> None:
    """Calibrate, or go on where an earlier run was stopped."""
    path = resolve_checkpoint(job.model)
    model = ModelConfig.from_dir(path)
    policy = SparsityPlan.default(model.num_layers, model.num_heads)
    # scouts bring tiles of their own; what columns and windows keep is to be measured alone
    bare = replace(policy, num_scouts=0)
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with _dense_engine(job, policy, options) as llm:
        texts, text_facts = _texts(job, llm)
        facts = {"model": job.model, "model_hash": weights_fingerprint(path),
                 "length": job.length, "texts": job.num_texts, "seed": job.seed, **text_facts,
                 "prefill_chunk_len": llm.config.prefill_chunk_len,
                 "dtype": llm.config.dtype}
        state = _State.open(job.out, facts)
        short = texts[0][:SEARCH_LEN]
        pairs = candidates(bare, len(short))
        initial = best_candidates(_measure("search", llm, pairs, [short], state), pairs)
        found = _measure("refine", llm, ladder(initial), texts, state)
    plan = refined(found, initial, job.recall)
    unrefined = job.out.with_suffix(".unrefined.json")
    finished = _finished(plan, policy, found, facts, job.recall)
    _finished(initial, policy, found, facts, None).save(unrefined)
    finished.save(job.out)
    show_heads(finished, job.recall)
    try:
        note(f"map: {draw_map(finished, job.out.with_suffix('.svg'))}")
    except MissingDependencyError as error:
        note(f"no map: {error}")
    note(f"plan: {job.out} (without refinement: {unrefined})")
    state.remove()


def _dense_engine(job: CalibrateJob, policy: SparsityPlan, options: dict[str, Any]) -> LLM:
    """Load an engine whose caches hold tile means and whose prefill attends to everything."""
    everything = tuple((MOST,) * len(row) for row in policy.slash)
    dense = replace(policy, slash=everything, tail_len=0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dense.json"
        dense.save(file)
        return LLM(job.model, attention="sparse", sparsity_plan=str(file), max_num_requests=1,
                   max_model_len=job.length + 1, **options)


def _texts(job: CalibrateJob, llm: LLM) -> tuple[list[array[int]], dict[str, Any]]:
    """Return the calibration texts, as token ids, and what names them.

    Raises `LongspanError` where there is less text than one calibration text needs.
    """
    bank = TextBank.from_roots(job.text_roots or python_text_roots(), llm.tokenizer)
    there = bank.count(job.length)
    if there < job.length:
        raise LongspanError(f"the texts have {there:,} tokens, --length {job.length:,} needs as "
                            "many at least; give more text or a smaller length")
    texts = []
    for number in range(job.num_texts):
        ids = array("i")
        for piece in bank.take(random.Random(f"calibrate:{job.seed}:{number}"), job.length):
            ids.extend(piece.ids)
        texts.append(ids[: job.length])
    return texts, {"text": bank.fingerprint}


def _measure(
    phase: str, llm: LLM, plans: Sequence[SparsityPlan], texts: Sequence[array[int]],
    state: _State,
) -> Tally:
    """Measure plans on texts, those chunks that an earlier run has measured left out."""
    shape = len(plans), len(plans[0].vertical), len(plans[0].vertical[0])
    tally, number, done = state.resume(phase, shape)
    for index in range(number, len(texts)):
        text = texts[index]
        first = max(len(text) // 2, done if index == number else 0)
        if first >= len(text):
            continue
        llm.observe(Calibrator(plans, tally, first))
        title = f"{phase} {index + 1}/{len(texts)}"
        with PrefillBar(title) as bar:
            def follow(event: Progress, bar: PrefillBar = bar, index: int = index) -> None:
                bar.update(event)
                state.save(phase, tally, index, event.num_prefilled_tokens)

            try:
                llm.generate(text, SCORED, on_progress=follow)
            except KeyboardInterrupt:
                note(f"stopped; the same command goes on with {state.file}")
                raise
        llm.observe(None)
        state.save(phase, tally, index + 1, 0)
    return tally


def _finished(
    plan: SparsityPlan, policy: SparsityPlan, found: Tally, facts: dict[str, Any],
    threshold: float | None,
) -> SparsityPlan:
    """Return a plan with the policy and its provenance. threshold None: it is not refined."""
    recalls = found.recalls()[0] if threshold is None else achieved(found, threshold)
    errors, least = found.output_errors(), threshold or 0.0
    diffuse = [{"layer": layer, "head": head, "recall": round(value, 4),
                "output_error": round(errors[layer][head], 4)}
               for layer, row in enumerate(recalls) for head, value in enumerate(row)
               if value < least]
    return replace(
        plan, num_scouts=policy.num_scouts, provenance={
            "source": "longspan calibrate", **facts, "threshold": threshold,
            "date": datetime.date.today().isoformat(),
            "recall": [[round(value, 4) for value in row] for row in recalls],
            "diffuse": diffuse})


class _State:
    """What an interrupted calibration leaves beside its plan."""

    def __init__(self, file: Path, facts: dict[str, Any], phases: dict[str, Any]) -> None:
        self.file, self._facts, self._phases = file, facts, phases

    @classmethod
    def open(cls, out: Path, facts: dict[str, Any]) -> _State:
        """Take up what is there. Raises `LongspanError` where it is another calibration's."""
        file = out.with_suffix(".partial.json")
        if not file.is_file():
            return cls(file, facts, {})
        raw = read_json(file)
        begun = raw.get("facts", {}) if isinstance(raw, dict) else {}
        changed = [f"{name} {begun.get(name)!r}, now {value!r}" for name, value in facts.items()
                   if begun.get(name) != value]
        if changed:
            raise LongspanError(f"{file} is of a calibration with {changed[0]}; finish it as it "
                                "was begun, or remove the file")
        note(f"going on with {file}")
        return cls(file, facts, raw["phases"])

    def resume(self, phase: str, shape: tuple[int, int, int]) -> tuple[Tally, int, int]:
        """Return the sums of a phase, the text it is at, and how many tokens of that are done."""
        raw = self._phases.get(phase)
        if raw is None:
            return Tally(*shape), 0, 0
        return Tally.load(raw["tally"]), raw["text"], raw["tokens"]

    def save(self, phase: str, tally: Tally, text: int, tokens: int) -> None:
        """Keep the sums; a file that is there stays whole whatever happens."""
        known = self._phases.get(phase)
        if known is not None and (known["text"], known["tokens"]) >= (text, tokens):
            return  # computed anew for its keys, but measured before
        self._phases[phase] = {"tally": tally.as_dict(), "text": text, "tokens": tokens}
        content = json.dumps({"facts": self._facts, "phases": self._phases})
        fresh = self.file.with_suffix(".tmp")
        fresh.write_text(content, encoding="utf-8")
        os.replace(fresh, self.file)

    def remove(self) -> None:
        """Remove it: the plan is there."""
        self.file.unlink(missing_ok=True)


