"""`longspan bench quality`: what sparse prefill answers and keeps, beside dense, at equal cost.

The same prompts for every setting: a question at the end, and many questions one after the other
at the end. An answer counts when the most probable token is right at each of its places, given the
ones before it. Recall of a head is the attention mass that its selection keeps,
exp(lse_sparse - lse_full), over the queries of the last prefill chunk that are computed sparsely.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan import ops
from longspan.attention.layer import allocate_cache
from longspan.attention.metadata import SequenceSlice, build_metadata
from longspan.attention.rope import build_rotary
from longspan.attention.sparsity import SparsityPlan
from longspan.bench.engine.questions import Quiz, common_prefix, many_questions, single_questions
from longspan.bench.session import BenchSession
from longspan.bench.timing import rounded, swapped
from longspan.commands.console import note, percent, show_table
from longspan.config import EngineConfig, dense_tail_start
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import LongspanError
from longspan.eval.stats import wilson_interval
from longspan.eval.text import TextBank, python_text_roots
from longspan.model import TORCH_DTYPES, build_model
from longspan.model.weights import load_weights

SETTINGS = ("dense", "tile", "paper")
MATCH_ROUNDS = 4
MATCHED = 0.03
"""Costs this close count as equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityOptions:
    """What was asked for on the command line."""

    model: str
    lengths: tuple[int, ...]
    settings: tuple[str, ...]
    num_single: int
    """Prompts with one question, about one document."""
    num_many: int
    """Questions of the prompt with many."""
    seed: int
    text_roots: tuple[Path, ...]
    chunk_len: int | None

    def __post_init__(self) -> None:
        unknown = [name for name in self.settings if name not in SETTINGS]
        if unknown:
            raise LongspanError(
                f"--attention: {unknown[0]!r} is not one of {', '.join(SETTINGS)}")


def run(session: BenchSession, options: QualityOptions) -> int:
    """Measure, write rows, print the table. Returns the exit status."""
    subject = Subject(options, session.device)
    bank = TextBank.from_roots(options.text_roots or python_text_roots(), subject.tokenizer)
    plans: dict[str, SparsityPlan | None] = {"dense": None, "tile": subject.plan}
    for length in options.lengths:
        rng = random.Random(f"{options.seed}:{length}")
        singles = single_questions(bank, subject.tokenizer, length, options.num_single, rng)
        many = many_questions(bank, subject.tokenizer, length, options.num_many, rng)
        matched_on = singles[0] if "paper" in options.settings else None
        for name in options.settings:
            for prompts, count in ((singles, 1), ([many], options.num_many)):
                key = {"model": Path(options.model).name, "num_tokens": length,
                       "num_questions": count, "attention": name,
                       "chunk_len": subject.chunk_len}
                match = matched_on if name == "paper" else None
                row = session.attempt(key, partial(_work, subject, prompts, plans, name, match))
                if name == "paper" and row is not None:
                    matched_on = None  # the same budgets for the prompt with many questions
    show(session.rows)
    return session.finish()


def _work(
    subject: Subject, prompts: Sequence[Quiz], plans: dict[str, SparsityPlan | None], name: str,
    match: Quiz | None,
) -> dict[str, Any]:
    if match is not None:
        plans[name] = subject.match(match, plans.get(name))
    return subject.measure(prompts, plans[name])


class Subject:
    """A model, and room for one prompt."""

    def __init__(self, options: QualityOptions, device: str) -> None:
        longest = max(options.lengths) + 64
        made = ResolvedEngine.resolve(EngineConfig(
            model=options.model, device=device, attention="sparse", max_model_len=longest,
            prefill_chunk_len=options.chunk_len, max_num_requests=1))
        assert made.plan is not None and made.config.dtype and made.config.prefill_chunk_len
        self.device, self.dca, self.config = device, made.dca, made.model
        self.plan, self.tokenizer = made.plan, Tokenizer(made.path)
        self.chunk_len, self.block_size = made.config.prefill_chunk_len, made.config.block_size
        dtype = TORCH_DTYPES[made.config.dtype]
        rotary = build_rotary(
            head_dim=made.model.head_dim, rope_theta=made.model.rope_theta, device=device,
            scaling=made.model.rope_scaling, max_model_len=longest, dca=made.dca)
        self.model = build_model(made.model, layers=range(made.model.num_layers), rotary=rotary,
                                 plan=made.plan, dtype=dtype, device=device)
        load_weights(self.model, made.path)
        self.caches = [allocate_cache(
            num_blocks=-(-longest // self.block_size), block_size=self.block_size, dtype=dtype,
            num_kv_heads=made.model.num_kv_heads, head_dim=made.model.head_dim, device=device,
            means=True) for _ in range(made.model.num_layers)]

    def measure(self, prompts: Sequence[Quiz], plan: SparsityPlan | None) -> dict[str, Any]:
        """Scores of all prompts; density and recall of the first one."""
        shared = common_prefix([quiz.ids for quiz in prompts])
        shared = min(shared, prompts[0].prompt_len - 1) // self.chunk_len * self.chunk_len
        recall = Recall(from_position=self._last_sparse_chunk(prompts[0].prompt_len, plan))
        with torch.inference_mode(), self._using(plan):
            self.model.reset_attention_stats()
            with recall.watch():
                hits = self._ask(prompts[0], 0, plan)
            kept, causal = self.model.attention_stats()
            for quiz in prompts[1:]:
                hits += self._ask(quiz, shared, plan)
        found = recall.by_layer(self.caches)
        low, high = wilson_interval(sum(hits), len(hits))
        return {"score": rounded(sum(hits) / len(hits)), "n": len(hits), "ci_low": rounded(low),
                "ci_high": rounded(high), "density": rounded(kept / causal, 4),
                "cost": rounded(kept / causal + self._mean_cost(plan), 4),
                "plan": _describe(plan), "recall": summary(found),
                "recall_by_head": [[[round(value, 4) for value in head] for head in layer]
                                   for layer in found]}

    def match(self, quiz: Quiz, start: SparsityPlan | None) -> SparsityPlan:
        """MInference's policy with budgets scaled until it costs what the tile plan does on this
        prompt, estimated on its last prefill chunk, and the one before if that is short."""
        plan = start or self.plan.paper()
        last = max(0, quiz.prompt_len - self.chunk_len // 2) // self.chunk_len * self.chunk_len
        with torch.inference_mode(), self._using(self.plan):
            self.model.reset_attention_stats()
            self._prefill(quiz, 0, quiz.prompt_len, self.plan)
            kept, causal = self.model.attention_stats()
        wanted = kept / causal + self._mean_cost(self.plan)
        for _ in range(MATCH_ROUNDS):
            with torch.inference_mode(), self._using(plan):
                self.model.reset_attention_stats()
                self._prefill(quiz, last, quiz.prompt_len, plan)
                density = whole_density(*self.model.attention_stats(), last, quiz.prompt_len)
            note(f"paper budgets: about {percent(density)} of all pairs, {percent(wanted)} wanted")
            if abs(density / wanted - 1) <= MATCHED:
                break
            plan = scaled(plan, wanted / density)
        return plan

    def _last_sparse_chunk(self, prompt_len: int, plan: SparsityPlan | None) -> int:
        """Where the last prefill chunk begins that has queries before the dense tail."""
        stop = dense_tail_start(prompt_len, plan.dense_tail_len if plan else 0)
        return max(0, stop - 1) // self.chunk_len * self.chunk_len

    def _mean_cost(self, plan: SparsityPlan | None) -> float:
        """What tile means add to the density: one key for each tile."""
        return 1 / self.block_size if plan is not None and plan.mean_correction else 0.0

    @contextmanager
    def _using(self, plan: SparsityPlan | None) -> Iterator[None]:
        """The layers attend by this plan for a while."""
        if plan is None:
            yield
            return
        cores = [layer.self_attn.core for layer in self.model.decoder_layers()]
        old = [(core.plan, core.budget) for core in cores]
        for index, core in enumerate(cores):
            core.plan, core.budget = plan, plan.layer(index)
        try:
            yield
        finally:
            for core, (old_plan, old_budget) in zip(cores, old, strict=True):
                core.plan, core.budget = old_plan, old_budget

    def _ask(self, quiz: Quiz, start: int, plan: SparsityPlan | None) -> list[bool]:
        """Which answers are right. ``start``: tokens already in the cache."""
        first = quiz.answers[0][0] - 1
        logits = self._prefill(quiz, start, quiz.prompt_len, plan, outputs_from=first)
        if quiz.answers[-1][0] == quiz.prompt_len:  # the answer is not part of the prompt
            answer = quiz.answers[-1][1]
            if len(answer) > 1:
                logits = torch.cat((logits, self._step(
                    answer[:-1], quiz.prompt_len, quiz.prompt_len, False, len(answer) - 1)))
        guesses = logits.argmax(-1).tolist()
        return [tuple(guesses[place - 1 - first :][: len(answer)]) == answer
                for place, answer in quiz.answers]

    def _prefill(
        self, quiz: Quiz, start: int, stop: int, plan: SparsityPlan | None,
        outputs_from: int | None = None,
    ) -> Tensor:
        """Compute tokens start ... stop - 1 in prefill chunks; logits of those from
        ``outputs_from`` on. Returns [n, V]."""
        outputs_from = stop if outputs_from is None else outputs_from
        found = []
        while start < stop:
            end = min(stop, (start // self.chunk_len + 1) * self.chunk_len)
            found.append(self._step(quiz.ids[start:end], start, quiz.prompt_len, plan is not None,
                                    max(0, end - max(start, outputs_from))))
            start = end
        return torch.cat(found)

    def _step(
        self, ids: Sequence[int], start: int, prompt_len: int, sparse: bool, num_outputs: int,
    ) -> Tensor:
        stop = start + len(ids)
        metadata = build_metadata(
            [SequenceSlice(query_len=len(ids), cached_len=start, prompt_len=prompt_len,
                           block_ids=range(-(-stop // self.block_size)), sparse=sparse,
                           num_outputs=num_outputs)],
            block_size=self.block_size, head_dim=self.config.head_dim, dca=self.dca,
            device=self.device)
        tokens = torch.tensor(ids, dtype=torch.int64).to(self.device)
        return self.model.logits(self.model(tokens, metadata, self.caches))


class Recall:
    """Watches sparse attention and asks dense attention for the mass that was there to keep."""

    def __init__(self, from_position: int) -> None:
        self._from = from_position
        self._found: list[tuple[int, Tensor]] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the calls whose queries stand at ``from_position`` or later."""
        attend: Any = ops.sparse_prefill_attention
        dense: Any = ops.prefill_attention

        def watched(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
            result: tuple[Tensor, Tensor, Tensor] = attend(*args)
            if args[3] >= self._from:
                # tile means are no keys: their mass is not kept
                lse = attend(*args[:7], False)[1] if args[7] else result[1]
                full = dense(*args[:6])[1]
                self._found.append((args[1].k.data_ptr(), torch.exp(lse - full)))
            return result

        with swapped(ops, "sparse_prefill_attention", watched):
            yield

    def by_layer(self, caches: Sequence[Any]) -> list[list[tuple[float, float, float]]]:
        """[layers][heads] of (mean, 5th percentile, least) over the queries; no layers where
        nothing was sparse."""
        found = []
        for cache in caches:
            parts = [recall for place, recall in self._found if place == cache.k.data_ptr()]
            if parts:
                rows = torch.cat(parts).double()
                fifth = torch.quantile(rows, 0.05, dim=0)
                found.append([(float(mean), float(low), float(least)) for mean, low, least in
                              zip(rows.mean(0), fifth, rows.amin(0), strict=True)])
        return found


def summary(by_layer: Sequence[Sequence[Sequence[float]]]) -> dict[str, float] | None:
    """Over all heads: mean of means, and the 5th percentile and the least of a head's mean."""
    means = sorted(head[0] for layer in by_layer for head in layer)
    if not means:
        return None
    values = torch.tensor(means, dtype=torch.float64)
    return {"mean": round(float(values.mean()), 4),
            "p5": round(float(torch.quantile(values, 0.05)), 4), "min": round(means[0], 4)}


def whole_density(kept: float, causal: float, start: int, stop: int) -> float:
    """Density of a prompt from that of its last chunk: each query keeps the same number of keys,
    or all it has."""
    num_queries = stop - start
    keys_there = num_queries * (start + (num_queries + 1) / 2)
    num_kept = kept / causal * keys_there / num_queries
    share = min(1.0, num_kept / stop)
    return 2 * share - share * share


def scaled(plan: SparsityPlan, factor: float) -> SparsityPlan:
    """The plan with all budgets multiplied."""
    def rows(values: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(max(1, round(factor * value)) for value in row) for row in values)
    return replace(plan, vertical=rows(plan.vertical), slash=rows(plan.slash))


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Scores and recall as a table on stdout."""
    def recall(row: Mapping[str, Any]) -> list[str]:
        return [percent((row["recall"] or {}).get(name)) for name in ("mean", "p5", "min")]
    show_table("quality", ("model", "tokens", "questions", "attention", "right", "n", "density",
                           "cost", "recall", "p5", "min"), [
        (row["model"], f"{row['num_tokens']:,}", row["num_questions"], row["attention"],
         percent(row["score"]), row["n"], percent(row["density"]), percent(row["cost"]),
         *recall(row))
        for row in rows if "error" not in row])


def _describe(plan: SparsityPlan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    heads = sum(map(len, plan.vertical))
    return {"mode": plan.mode, "mean_vertical": round(sum(map(sum, plan.vertical)) / heads),
            "mean_slash": round(sum(map(sum, plan.slash)) / heads),
            "correction": plan.mean_correction, "probe_last": plan.probe_last,
            "probe_strided": plan.probe_strided, "num_scouts": plan.num_scouts,
            "scout_threshold": plan.scout_threshold, "dense_tail_len": plan.dense_tail_len}
