"""`longspan bench quality`: what sparse prefill answers and keeps, beside dense, at equal cost.

The same prompts for every setting: a question at the end, and prompts with many questions (see
`questions`). An answer counts when the most probable token is right at each of its places, given
the ones before it. KL is that of the next token, from dense attention, at places spread over what
follows the first answer. Recall of a head is the attention mass that its selection keeps,
exp(lse_sparse - lse_full), over the queries of the last prefill chunk that are computed sparsely.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from longspan.attention.head_errors import HeadErrors
from longspan.attention.sparsity import SparsityPlan
from longspan.bench.engine.engine import free_memory
from longspan.bench.engine.oracle import Oracle
from longspan.bench.engine.questions import Place, Quiz, many_questions, single_questions
from longspan.bench.ops.tiles import mean_share
from longspan.bench.session import BenchSession
from longspan.bench.shapes import changed, scaled
from longspan.bench.timing import rounded
from longspan.commands.console import note, percent, show_table
from longspan.commands.fidelity import LogitWatch
from longspan.config import KV_DTYPES, EngineConfig, Quantization
from longspan.engine.control.chunking import tail_start
from longspan.engine.front.llm import LLM
from longspan.engine.request import RequestOutput, SamplingParams
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import LongspanError
from longspan.eval.stats import nats_estimate, wilson_interval
from longspan.eval.text import TextBank, python_text_roots

SETTINGS = ("dense", "tile", "paper")
PLACES = ("one", *get_args(Place))
"""Kinds of prompts: with one question, and those with many."""
MATCH_ROUNDS = 4
MATCHED = 0.03
"""Costs this close count as equal."""
KL_PLACES = 512
"""Places of a prompt where distributions are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityOptions:
    """What was asked for on the command line."""

    model: str
    lengths: tuple[int, ...]
    settings: tuple[str, ...]
    num_single: int
    """Prompts with one question, about one document."""
    num_many: int
    """Questions of the prompts with many."""
    places: tuple[str, ...] = PLACES
    memory_gib: float | None = None
    dtype: str | None = None
    threads: int | None = None
    policies: tuple[str, ...] = ()
    """Further ``tile`` settings, as `shapes.PlanOptions.policy`."""
    plans: tuple[Path, ...] = ()
    """Files of further plans."""
    quantizations: tuple[str, ...] = ()
    kv_dtypes: tuple[str, ...] = ()
    """Weights and KV caches that dense and ``tile`` are measured with besides."""
    oracles: tuple[float, ...] = ()
    """Shares of the key tiles that `Oracle` keeps."""
    with_heads: bool = True
    """Measure recall by head, which costs more than the prefill: times are of no use then."""
    seeds: tuple[int, ...]
    """One prompt of each kind, one row of each setting, for each of them."""
    text_roots: tuple[Path, ...]
    chunk_len: int | None

    def __post_init__(self) -> None:
        for option, given, known in (("attention", self.settings, SETTINGS),
                                     ("places", self.places, PLACES),
                                     ("quantization", self.quantizations, get_args(Quantization)),
                                     ("kv-dtype", self.kv_dtypes, KV_DTYPES)):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise LongspanError(
                    f"--{option}: {unknown[0]!r} is not one of {', '.join(known)}")
        wrong = [share for share in self.oracles if not 0 < share <= 1]
        if wrong:
            raise LongspanError(f"--oracle is {wrong[0]:g}; a share of all key tiles above 0 and "
                                "at most 1 is needed")


@dataclass(frozen=True, slots=True)
class Setting:
    """One way of attending."""

    name: str
    plan: SparsityPlan | None
    """None: dense."""
    oracle: Oracle | None = None
    precision: Mapping[str, str] = field(default_factory=dict)
    """``quantization`` and ``kv_dtype`` of its engine."""

    @property
    def is_reference(self) -> bool:
        """Whether the others are compared with it."""
        return self.plan is None and not self.precision


DENSE = Setting("dense", None)


def run(session: BenchSession, options: QualityOptions) -> int:
    """Measure, write rows, print the table. Returns the exit status."""
    subject = Subject(options, session.device)
    bank = TextBank.from_roots(options.text_roots or python_text_roots(), subject.tokenizer)
    settings = settings_of(options, subject.plan)
    for length, seed in product(options.lengths, options.seeds):
        prompts = _Prompts(
            subject, make_prompts(options, bank, subject.tokenizer, length, seed))
        for setting, place in product(settings, prompts.quizzes):
            key = {"model": Path(options.model).name, "num_tokens": length,
                   "num_questions": 1 if place == "one" else options.num_many,
                   "place": "end" if place == "one" else place, "attention": setting.name,
                   "chunk_len": subject.chunk_len, "seed": seed}
            session.attempt(key, partial(prompts.measure, setting, place))
    show(session.rows)
    return session.finish()


def settings_of(options: QualityOptions, plan: SparsityPlan) -> list[Setting]:
    """List what is compared, dense first: the others are compared with it."""
    known = {"dense": None, "tile": plan, "paper": plan.paper()}
    found = [Setting(name, known[name]) for name in SETTINGS if name in options.settings]
    plain = [setting for setting in found if setting.name != "paper"]
    found += [replace(setting, name=f"{setting.name} {value}{suffix}", precision={name: value})
              for name, values, suffix in (("quantization", options.quantizations, " weights"),
                                           ("kv_dtype", options.kv_dtypes, " KV"))
              for value in values for setting in plain]
    for policy in options.policies:
        kind = "paper" if "mode=paper" in policy.split(",") else "tile"
        found.append(Setting(f"{kind} {policy}", changed(plan, policy)))
    found += [Setting(f"plan {file.stem}", SparsityPlan.load(file)) for file in options.plans]
    everywhere = changed(plan, "slash=1")  # not only behind the first windows
    found += [Setting(f"oracle {share:g}", everywhere, Oracle(share)) for share in options.oracles]
    return found


def make_prompts(
    options: QualityOptions, bank: TextBank, tokenizer: Tokenizer, length: int, seed: int,
) -> dict[str, list[Quiz]]:
    """Make the prompts of each kind that is asked for; the same, whatever else is asked for."""
    found: dict[str, list[Quiz]] = {}
    rng = random.Random(f"{seed}:{length}")
    single = single_questions(bank, tokenizer, length, options.num_single, rng)
    for place in get_args(Place):
        own = rng
        if place not in ("end", "spread"):
            own = random.Random(f"{seed}:{length}:{place}")
        if place in options.places or place == "end":  # it draws from the same numbers as spread
            found[place] = [many_questions(
                bank, tokenizer, length, options.num_many, own, place=place)]
    return {place: quizzes for place, quizzes in ({"one": single} | found).items()
            if place in options.places}


def _kl_places(quiz: Quiz) -> np.ndarray:
    places = np.linspace(quiz.answers[0][0], quiz.prompt_len - 1, KL_PLACES)
    return np.unique(places.round().astype(int))


class Subject:
    """A model, and an engine for each of its measurements: nothing is cached when one begins."""

    def __init__(self, options: QualityOptions, device: str) -> None:
        self._options: dict[str, Any] = {
            "device": device, "max_model_len": max(options.lengths) + 64, "max_num_requests": 1,
            "prefill_chunk_len": options.chunk_len, "memory_gib": options.memory_gib,
            "dtype": options.dtype, "num_threads": options.threads}
        self._model, self._with_heads = options.model, options.with_heads
        made = ResolvedEngine.resolve(
            EngineConfig(model=options.model, attention="sparse", **self._options))
        assert made.plan is not None and made.config.prefill_chunk_len
        self._last_layer = made.model.num_layers - 1
        self.plan, self.tokenizer = made.plan, Tokenizer(made.path)
        self.chunk_len, self.block_size = made.config.prefill_chunk_len, made.config.block_size

    def measure(
        self, prompts: Sequence[Quiz], setting: Setting, watch: LogitWatch | None = None,
    ) -> dict[str, Any]:
        """Measure the scores of all prompts, density and recall of the first one."""
        plan = setting.plan
        # the last layer computes few rows, or all of them
        heads = HeadErrors(from_position=self._last_sparse_chunk(prompts[0].prompt_len, plan),
                           skipped_layer=self._last_layer)
        with self._engine(setting) as llm:
            if self._with_heads:
                llm.observe(heads)
            llm.watch_logits(watch)
            start = time.perf_counter()
            hits, output = ask(llm, prompts[0])
            elapsed_s = time.perf_counter() - start
            llm.watch_logits(None)
            llm.observe(None)
            for quiz in prompts[1:]:
                hits += ask(llm, quiz)[0]
            nats = nats_of(prompts[0], output)
        assert output.density is not None and not output.num_cached_tokens
        found = heads.recalls()
        low, high = wilson_interval(sum(hits), len(hits))
        recall = output.recall
        return {**nats, **_compared(watch), "score": rounded(sum(hits) / len(hits)), "n": len(hits),
                "ci_low": rounded(low), "ci_high": rounded(high),
                "density": rounded(output.density, 4),
                "cost": rounded(self._cost(output, plan), 4),
                "seconds": None if self._with_heads else rounded(elapsed_s),
                "recall_typical": None if recall is None else rounded(recall.typical, 4),
                "recall_scouts": None if recall is None else rounded(recall.scouts, 4),
                "plan": _describe(plan), "recall": summary(found),
                "recall_by_head": [[[round(value, 4) for value in head] for head in layer]
                                   for layer in found]}

    def match(self, quiz: Quiz, start: SparsityPlan | None) -> SparsityPlan:
        """Return MInference's policy with budgets scaled until this prompt costs what it costs with
        the tile plan; the nearest that was tried, for costs go up in steps."""
        plan, wanted = start or self.plan.paper(), self._cost_of(quiz, self.plan)
        tried: list[tuple[float, float]] = []
        factor = 1.0
        for _ in range(MATCH_ROUNDS):
            cost = self._cost_of(quiz, scaled(plan, factor))
            note(f"paper budgets: {percent(cost)} of all pairs, {percent(wanted)} wanted")
            tried.append((cost, factor))
            if abs(cost / wanted - 1) <= MATCHED:
                break
            factor = _next_factor(tried, wanted)
        return scaled(plan, min(tried, key=lambda pair: abs(math.log(pair[0] / wanted)))[1])

    def _cost_of(self, quiz: Quiz, plan: SparsityPlan) -> float:
        with self._engine(Setting("paper", plan)) as llm:
            return self._cost(llm.generate([quiz.ids], SamplingParams(max_tokens=1))[0], plan)

    def _cost(self, output: RequestOutput, plan: SparsityPlan | None) -> float:
        """Return the density plus what tile means add to it."""
        assert output.density is not None
        if plan is None or not plan.mean_correction:
            return output.density
        return output.density + mean_share(
            output.num_prompt_tokens, self.block_size, plan.mean_near_len)

    def _last_sparse_chunk(self, prompt_len: int, plan: SparsityPlan | None) -> int:
        """Return where the last prefill chunk begins that has queries before the tail."""
        stop = tail_start(prompt_len, plan.tail_len if plan else 0, self.block_size)
        return max(0, stop - 1) // self.chunk_len * self.chunk_len

    @contextmanager
    def _engine(self, setting: Setting) -> Iterator[LLM]:
        """Open an engine that attends so."""
        plan, precision = setting.plan, {"quantization": "none", **setting.precision}
        free_memory(str(self._options["device"]))
        with tempfile.TemporaryDirectory() as folder:
            if plan is None:
                engine = LLM(
                    self._model, attention="dense", **self._options, **precision)
            else:
                file = Path(folder) / "plan.json"
                plan.save(file)
                engine = LLM(
                    self._model, attention="sparse", sparsity_plan=str(file), **self._options,
                    **precision)
            with engine:
                engine.select_by(setting.oracle)
                yield engine


class _Prompts:
    """The prompts of one length, and what dense attention makes of them."""

    def __init__(self, subject: Subject, quizzes: Mapping[str, Sequence[Quiz]]) -> None:
        self.quizzes, self._subject = quizzes, subject
        self._references: dict[str, Tensor] = {}
        self._paper: SparsityPlan | None = None
        """The budgets at which MInference's policy costs what the tile plan costs."""

    def measure(self, setting: Setting, place: str) -> dict[str, Any]:
        """Measure the prompts of one kind."""
        quizzes = self.quizzes[place]
        if setting.name == "paper":
            self._paper = self._paper or self._subject.match(quizzes[0], setting.plan)
            setting = replace(setting, plan=self._paper)
        if place == "one":
            return self._subject.measure(quizzes, setting)
        if setting.is_reference:
            watch = LogitWatch(_kl_places(quizzes[0]), None)
            row = self._subject.measure(quizzes, setting, watch)
            self._references[place] = torch.cat(watch.logprobs)
            return row | {"kl": 0.0, "top1": 1.0}
        watch = LogitWatch(_kl_places(quizzes[0]), self._reference(place))
        return self._subject.measure(quizzes, setting, watch)

    def _reference(self, place: str) -> Tensor:
        """Return dense attention's distributions; they are not there yet where an earlier run
        measured dense attention."""
        if place not in self._references:
            self.measure(DENSE, place)
        return self._references[place]


def _next_factor(tried: Sequence[tuple[float, float]], wanted: float) -> float:
    """Return the factor to try next, from (cost, factor) of those tried: between the two that
    enclose what is wanted, or in proportion."""
    below = max((pair for pair in tried if pair[0] < wanted), default=None)
    above = min((pair for pair in tried if pair[0] >= wanted), default=None)
    if below is None or above is None:
        cost, factor = tried[-1]
        return factor * wanted / cost
    place = math.log(wanted / below[0]) / math.log(above[0] / below[0])
    return float(below[1] * (above[1] / below[1]) ** place)


def ask(llm: LLM, quiz: Quiz) -> tuple[list[bool], RequestOutput]:
    """Return which answers are right, and the output: an answer behind the prompt is generated,
    those inside it are forced, and each token's predecessor must find it the most probable."""
    place, answer = quiz.answers[-1]
    if place == quiz.prompt_len:
        params = SamplingParams(max_tokens=len(answer), ignore_eos=True)
        (output,) = llm.generate([quiz.ids], params)
        return [output.token_ids == answer], output
    params = SamplingParams(max_tokens=0, prompt_logprobs=1,
                            prompt_logprobs_start=quiz.answers[0][0])
    (output,) = llm.generate([quiz.ids], params)
    assert output.prompt_alternatives is not None
    guesses = output.prompt_alternatives.top_ids[:, 0]
    return [tuple(guesses[place : place + len(answer)].tolist()) == answer
            for place, answer in quiz.answers], output


def nats_of(quiz: Quiz, output: RequestOutput) -> dict[str, float]:
    """Return the mean nats of an answer's token, and of the text from the first answer on, where
    the prompt holds its answers."""
    if output.prompt_logprobs is None:
        return {}
    nats = -output.prompt_logprobs.astype(np.float64)
    inside = np.zeros(len(nats), dtype=bool)
    for place, answer in quiz.answers:
        inside[place : place + len(answer)] = True
    text = ~inside & ~np.isnan(nats)
    return {"answer_nats": round(float(nats[inside].mean()), 4),
            "text_nats": round(float(nats[text].mean()), 4)}


def _compared(watch: LogitWatch | None) -> dict[str, float]:
    """Return how far the distributions are from dense attention's, where those are known."""
    if watch is None or watch.reference is None:
        return {}
    kl = nats_estimate(torch.cat(watch.kl).tolist())
    return {"kl": round(kl.mean, 5), "kl_low": round(kl.low, 5), "kl_high": round(kl.high, 5),
            "top1": round(float(torch.cat(watch.agrees).float().mean()), 4)}


def summary(by_layer: Sequence[Sequence[Sequence[float]]]) -> dict[str, float] | None:
    """Summarise over all heads: mean of means, and the 5th percentile and the least of a head's
    mean."""
    means = sorted(head[0] for layer in by_layer for head in layer)
    if not means:
        return None
    values = torch.tensor(means, dtype=torch.float64)
    return {"mean": round(float(values.mean()), 4),
            "p5": round(float(torch.quantile(values, 0.05)), 4), "min": round(means[0], 4)}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print scores and recall as a table on stdout."""
    def recall(row: Mapping[str, Any]) -> list[str]:
        return [percent((row["recall"] or {}).get(name)) for name in ("mean", "p5", "min")]
    show_table("quality", ("model", "tokens", "questions", "place", "attention", "right", "n",
                           "density", "cost", "recall", "p5", "min"), [
        (row["model"], f"{row['num_tokens']:,}", row["num_questions"], row["place"],
         row["attention"], percent(row["score"]), row["n"], percent(row["density"]),
         percent(row["cost"]), *recall(row))
        for row in rows if "error" not in row])


def _describe(plan: SparsityPlan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    heads = sum(map(len, plan.vertical))
    return {"mode": plan.mode, "mean_vertical": round(sum(map(sum, plan.vertical)) / heads),
            "mean_slash": round(sum(map(sum, plan.slash)) / heads),
            "correction": plan.mean_correction, "probe_last": plan.probe_last,
            "probe_strided": plan.probe_strided, "num_scouts": plan.num_scouts,
            "scout_threshold": plan.scout_threshold, "tail_len": plan.tail_len}
