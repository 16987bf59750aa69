"""The models that `longspan eval run` asks: our engine in this process, or an address."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longspan.commands.console import PrefillBar
from longspan.commands.info import position_label
from longspan.commands.results import describe_run
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.front.llm import LLM
from longspan.engine.request import RequestOutput, SamplingParams
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.errors import LongspanError
from longspan.eval.endpoint import Endpoint, EndpointConfig
from longspan.eval.prompt import Prompt
from longspan.eval.task import Answer, Model
from longspan.model.weights import resolve_checkpoint

HASHED_BYTES = 2**22
ATTENTION = ("dense", "sparse", "paper")
"""``paper``: the budgets of ``sparse``, chosen by MInference's policy as the report has it."""
POSITIONS = ("auto", "rope", "dca", "dca+yarn")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelJob:
    """Which model is asked, and in which settings."""

    model: str
    """Checkpoint, or the name at the endpoint."""
    name: str | None = None
    endpoint: EndpointConfig | None = None
    label: str | None = None
    """How rows name the attention of an endpoint."""
    attention: tuple[str, ...] = ("dense",)
    positions: tuple[str, ...] = ("auto",)
    max_model_len: int | None = None
    options: Mapping[str, Any]
    """Fields of `EngineConfig`."""
    concurrency: int = 1
    """Documents that the model is asked about at a time."""

    @property
    def shown_name(self) -> str:
        """The model as rows name it."""
        return self.name or Path(self.model).name


@dataclass(frozen=True, slots=True)
class Setting:
    """How the model attends."""

    attention: str
    """One of `ATTENTION`; empty for an endpoint."""
    positions: str
    """``rope``, ``dca`` or ``dca+yarn``; of an endpoint its label."""
    plan: str | None = None
    """Name of the budgets, where a file of them was given."""

    @property
    def label(self) -> str:
        """As result rows name it: the positions, behind ``sparse-`` or ``paper-`` if so; a plan's
        name stands for ``sparse``, and behind ``paper``."""
        if self.attention in ("", "dense"):
            return self.positions
        if self.attention == "sparse":
            return f"{self.plan or 'sparse'}-{self.positions}"
        return "-".join(name for name in (self.attention, self.plan, self.positions) if name)


def settings(job: ModelJob) -> tuple[Setting, ...]:
    """List what is measured one after the other. Raises `LongspanError` for an unknown word."""
    if job.endpoint is not None:
        return (Setting("", job.label or "served"),)
    for attention in job.attention:
        if attention not in ATTENTION:
            raise LongspanError(f"--attention: {attention!r} is not one of {', '.join(ATTENTION)}")
    for positions in job.positions:
        if positions not in POSITIONS:
            raise LongspanError(f"--positions: {positions!r} is not one of {', '.join(POSITIONS)}")
    facts = ModelConfig.from_dir(resolve_checkpoint(job.model), wanted_len=job.max_model_len)
    labels = [position_label(EngineConfig(model=job.model, positions=positions), facts)  # type: ignore[arg-type]
              for positions in job.positions]
    plan = job.options.get("sparsity_plan")
    name = Path(plan).stem if plan else None
    return tuple(dict.fromkeys(Setting(a, p, name) for p in labels for a in job.attention))


def model_limit(job: ModelJob) -> int | None:
    """Return the longest prompt and answer that the model takes; None where nobody says."""
    if job.endpoint is not None:
        with Endpoint(job.endpoint) as endpoint:
            return job.max_model_len or endpoint.max_model_len()
    claimed = ModelConfig.from_dir(resolve_checkpoint(job.model)).max_position_embeddings
    return job.max_model_len or claimed


def check_lengths(job: ModelJob, lengths: Sequence[int]) -> int | None:
    """Return `model_limit`. Raises `LongspanError` for a length above it."""
    limit = model_limit(job)
    if limit is not None and max(lengths, default=0) > limit:
        raise LongspanError(f"--lengths: {max(lengths):,} tokens are more than the model's limit "
                            f"of {limit:,}; leave such lengths out")
    return limit


@contextmanager
def open_model(
    job: ModelJob, setting: Setting, longest: int
) -> Iterator[tuple[Model, dict[str, Any]]]:
    """Open the model in one setting; yields it and what a result file says about where it ran."""
    if job.endpoint is not None:
        about = describe_run("cpu")
        about["device"] = {"name": "endpoint", "url": job.endpoint.url}
        with Endpoint(job.endpoint) as endpoint:
            scores = job.endpoint.api == "completions"
            yield Model(endpoint, endpoint.score if scores else None), about
        return
    with open_llm(job, setting, longest) as llm:
        engine = EngineModel(llm, shows_progress=job.concurrency == 1)
        yield Model(engine, engine.score), describe_run(str(llm.config.device))


@contextmanager
def open_llm(
    job: ModelJob, setting: Setting, longest: int, more: Mapping[str, Any] | None = None
) -> Iterator[LLM]:
    """Open our engine in one setting, for prompts and answers of at most `longest` tokens.

    Args:
        more: fields of `EngineConfig`, before those of the job.
    """
    options = {"positions": setting.positions, "max_model_len": longest, **job.options,
               **(more or {})}
    if setting.attention != "paper":
        with LLM(job.model, attention=setting.attention, **options) as llm:
            yield llm
        return
    plan = ResolvedEngine.resolve(
        EngineConfig(model=job.model, attention="sparse", **options), must_fit=False).plan
    assert plan is not None, "sparse prefill has budgets"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        plan.paper().save(file)
        with LLM(job.model, attention="sparse", **{**options, "sparsity_plan": str(file)}) as llm:
            yield llm


class EngineModel:
    """`Generate` and `Score` by our engine. The first prompt of a document runs alone: the others
    then find its beginning in the prefix cache. Safe to use from several threads, whose prompts are
    then computed together.

    Args:
        shows_progress: of long prefills, for one thread.
    """

    def __init__(self, llm: LLM, shows_progress: bool = True) -> None:
        self._llm, self._shows_progress = llm, shows_progress

    def __call__(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
        """Greedy answers, or none when memory runs out."""
        return self._ask(prompts, [SamplingParams(max_tokens=max_tokens)] * len(prompts))

    def score(self, prompts: Sequence[Prompt], firsts: Sequence[int] = ()) -> list[Answer]:
        """Log-probabilities, or none when memory runs out."""
        return self._ask(prompts, [
            SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=first)
            for first in firsts or [0] * len(prompts)])

    def _ask(self, prompts: Sequence[Prompt], each: Sequence[SamplingParams]) -> list[Answer]:
        ids = [prompt.ids for prompt in prompts]
        try:
            with PrefillBar() as bar:
                outputs = self._llm.generate(
                    [ids[0]], each[0], bar.update if self._shows_progress else None)
            if len(ids) > 1:
                outputs += self._llm.generate(list(ids[1:]), each[1:])
        except torch.OutOfMemoryError as error:
            return [Answer(status="oom", error=str(error).split("\n")[0]) for _ in prompts]
        return [_answer(output) for output in outputs]


def fingerprint(job: ModelJob, setting: Setting, prompts: Mapping[str, Any]) -> str:
    """Hash everything that answers depend on besides tasks and lengths: prompts' materials,
    weights, engine options. Weights count with their size and their end: hashing all of a large
    checkpoint would take minutes."""
    engine = {name: value for name, value in job.options.items()
              if name not in ("memory_gib", "num_threads")}
    endpoint = None if job.endpoint is None else (job.endpoint.model, job.endpoint.api)
    facts = [dict(prompts), setting.label, engine, endpoint]
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    if job.endpoint is None:
        path = resolve_checkpoint(job.model)
        for file in sorted([*path.glob("*.json"), *path.glob("*.safetensors")]):
            with file.open("rb") as data:
                size = data.seek(0, 2)
                data.seek(max(0, size - HASHED_BYTES))
                found.update(f"{file.name} {size}".encode() + data.read())
    return found.hexdigest()[:16]


def _answer(output: RequestOutput) -> Answer:
    found = output.prompt_logprobs
    return Answer(text=output.text, num_cached_tokens=output.num_cached_tokens,
                  density=output.density, ttft_s=output.ttft_s,
                  logprobs=None if found is None else found[1:])


