"""Pipelines whose ranks are threads, some of them with several ranks a stage: the answers of one
rank, while all stages compute."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longspan.attention import shared_decode
from longspan.attention.sparsity import SparsityPlan
from longspan.engine.control.latency import Costs
from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler, SchedulerConfig
from longspan.engine.control.stage_plan import equal_split
from longspan.engine.control.transport import LocalTransport, Transport
from longspan.engine.device.runner import Runner
from longspan.engine.device.stage import ALONE, StageLink, StagePlace
from longspan.engine.device.stage_runner import StagedStep, StageRunner, merge
from longspan.engine.step import PromptLogprobs, ScheduledBatch, StepResult
from tests.doubles import make_request, write_checkpoint
from tests.engine.device.rank_threads import Board, ThreadGroup
from tests.engine.device.runners import BLOCK, CHUNK, LENGTH, PIECE_ROWS, load_runner

LAYERS, HEADS = 5, 4
DCA: dict[str, Any] = {
    "chunk_size": 640, "local_size": 128, "original_max_position_embeddings": 512}
PLAN = replace(SparsityPlan.default(LAYERS, HEADS, vertical=24, slash=48), num_scouts=4,
               most_scouts=16, scout_tiles=2, probe_last=8, probe_strided=4, tail_len=64,
               mean_near_len=128)
WAIT_S = 60.0


class QueueLink(StageLink):
    """Hands rows to the next thread."""

    def __init__(self, index: int, edges: list[Queue[Tensor]]) -> None:
        super().__init__(index, len(edges))
        self._edges = edges
        self.num_sent = 0

    def send(self, rows: Tensor) -> None:
        """Send rows."""
        self.num_sent += 1
        self._edges[self.index].put(rows.clone())

    def _receive(self, num_rows: int) -> Tensor:
        return self._edges[self.index - 1].get(timeout=WAIT_S)


class Ring:
    """Launches every step on all ranks, each on a thread of its own; a loop's transport. The first
    stage's ranks come first."""

    def __init__(self, runners: list[StageRunner]) -> None:
        self.runners = runners
        self.max_in_flight = runners[0].max_in_flight
        self._pools = [ThreadPoolExecutor(1) for _ in runners]
        self._steps = deque[list[Future[StagedStep]]]()
        self.most_ahead = 0
        """Steps that the first rank had finished with while the last one computed."""

    def submit(self, batch: ScheduledBatch) -> None:
        """Hand a step to all ranks."""
        self._steps.append([pool.submit(runner.launch, batch)
                            for pool, runner in zip(self._pools, self.runners, strict=True)])

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """Wait for the oldest step."""
        waiting = self._steps.popleft()
        waiting[0].result(WAIT_S)
        if not waiting[-1].done():
            self.most_ahead = max(self.most_ahead, sum(
                later[0].done() for later in self._steps) + 1)
        sampling = [pool.submit(step.result(WAIT_S).wait) for pool, step, runner in zip(
            self._pools, waiting, self.runners, strict=True) if runner.is_first]
        found = [future.result(WAIT_S) for future in sampling]
        assert all(other.token_ids == found[0].token_ids for other in found)
        return merge([*found, *(step.result(WAIT_S).wait() for step in waiting[len(found):])])

    def discard(self) -> None:
        """Nothing is interrupted here."""

    def close(self) -> None:
        """End the threads."""
        for pool in self._pools:
            pool.shutdown()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Checkpoints whose head is the embedding, or is not."""
    tied, untied = (tmp_path_factory.mktemp(name) for name in ("tied", "untied"))
    write_checkpoint(tied, num_hidden_layers=LAYERS, dual_chunk_attention_config=DCA)
    write_checkpoint(untied, num_hidden_layers=LAYERS, dual_chunk_attention_config=DCA,
                     tie_word_embeddings=False)
    weights = load_file(untied / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, untied / "model.safetensors")
    return {True: tied, False: untied}


def load(
    path: Path, plan: SparsityPlan | None, place: StagePlace = ALONE, **options: Any,
) -> Runner:
    return load_runner(path, plan, 200, place, **options)


def ring_of(
    path: Path, plan: SparsityPlan | None, count: int, rows: int = 1, heads: int = 1,
    **options: Any,
) -> Ring:
    """Make ``count`` stages of rows x heads ranks each, numbered as a `RankMesh` has them."""
    edges = [[Queue[Tensor]() for _ in range(count)] for _ in range(rows * heads)]
    runners = []
    for index, layers in enumerate(equal_split(LAYERS, count)):
        for_rows, for_heads = ([Board(size) for _ in range(number)]
                               for size, number in ((rows, heads), (heads, rows)))
        for own in range(rows * heads):
            row, head = divmod(own, heads)
            link = QueueLink(index, edges[own])
            runner = load(path, plan, StagePlace(link, layers, ThreadGroup(
                head, for_heads[row]) if heads > 1 else None), **options)
            if rows > 1:
                runner.use_group(ThreadGroup(row, for_rows[head]), plan)
            runners.append(StageRunner(runner, link, tells=own == 0))
    return Ring(runners)


@pytest.fixture
def rings() -> Iterator[list[Ring]]:
    found: list[Ring] = []
    yield found
    for ring in found:
        ring.close()


class Answers:
    """Random requests through scheduler and loop: shared prefixes, batches, log-probabilities."""

    def __init__(
        self, transport: Transport, seed: int, count: int, *, sparse: bool,
        budget_s: float | None = None,
    ) -> None:
        rng = random.Random(seed)
        self.loop = Loop(Scheduler(SchedulerConfig(
            num_blocks=200, block_size=BLOCK, max_model_len=LENGTH, prefill_chunk_len=CHUNK,
            max_num_requests=4, num_layers=LAYERS, piece_rows=PIECE_ROWS, unit_len=BLOCK,
            tail_len=PLAN.tail_len if sparse else 0, num_stages=count,
            prior=Costs(dense=(1e-3, 1e-4, 3e-7)), step_budget_s=budget_s)), transport)
        stem = [rng.randrange(256) for _ in range(800)]
        self.tokens = dict[str, list[int]]()
        self.scores = dict[str, list[PromptLogprobs]]()
        self.pairs, self.recalls = [0.0, 0.0], dict[str, list[float]]()
        self.requests = []
        for index in range(6):
            prompt = [*stem[: rng.choice([0, 300, 600, 800])],
                      *(rng.randrange(256) for _ in range(rng.choice([5, 90, 200])))]
            params: dict[str, Any] = rng.choice([
                {}, {}, {"temperature": 0.8, "top_k": 20}, {"repetition_penalty": 1.3},
                {"prompt_logprobs": 1}, {"logprobs": 2}])
            self.requests.append(make_request(
                str(index), prompt, sparse=sparse and rng.random() < 0.7, max_tokens=5,
                ignore_eos=True, **params))

    def run(self) -> None:
        """Compute them all."""
        for request in self.requests:
            self.tokens[request.request_id] = []
            self.loop.add(request)
        while not self.loop.is_idle:
            report = self.loop.turn()
            self.pairs = [self.pairs[0] + report.kept_pairs, self.pairs[1] + report.causal_pairs]
            for score in report.prompt_logprobs:
                self.scores.setdefault(score.request_id, []).append(score)
            for recall in report.recalls:
                sums = self.recalls.setdefault(recall.request_id, [0.0, 0.0, 0.0])
                for place, value in enumerate((
                        recall.typical, recall.typical_weight, recall.num_tokens)):
                    sums[place] += value
            for update in report.updates:
                assert not update.failure
                if update.token_id is not None:
                    self.tokens[update.request_id].append(update.token_id)

    @property
    def num_cached(self) -> int:
        """Tokens that came from the prefix cache."""
        return sum(request.num_cached_tokens for request in self.requests)


def logprobs_of(parts: list[PromptLogprobs]) -> Tensor:
    return torch.cat([torch.frombuffer(bytearray(part.logprobs), dtype=torch.float32)
                      for part in sorted(parts, key=lambda part: part.first)])


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_stages_gives_the_answers_of_one_rank(
    paths: dict[bool, Path], rings: list[Ring], sparse: bool, count: int,
) -> None:
    path = paths[count == 2]
    plan = PLAN if sparse else None
    alone = load(path, plan)
    rings.append(ring_of(path, plan, count))
    num_cached = num_scored = 0
    for seed in range(2):
        one = Answers(LocalTransport(alone), seed, count, sparse=sparse)
        many = Answers(rings[0], seed, count, sparse=sparse,
                       budget_s=[None, 0.05][seed])
        one.run()
        many.run()
        assert many.tokens == one.tokens, f"seed {seed}"
        assert many.scores.keys() == one.scores.keys()
        for name, parts in one.scores.items():
            torch.testing.assert_close(logprobs_of(many.scores[name]), logprobs_of(parts),
                                       atol=1e-4, rtol=1e-4)
        num_cached += many.num_cached
        num_scored += len(many.scores)
        if seed == 0:
            assert many.pairs == pytest.approx(one.pairs)
            assert many.recalls.keys() == one.recalls.keys()
            for name, sums in one.recalls.items():
                assert many.recalls[name][:2] == pytest.approx(sums[:2], rel=1e-5)
    assert num_cached > 0 and num_scored > 0


@pytest.mark.parametrize(("heads", "kind", "budget_s"), [
    (2, "dense", 0.2), (1, "sparse", None), (1, "divided", 0.1)])
def test_stages_of_several_ranks_give_the_answers_of_one(
    tmp_path: Path, rings: list[Ring], heads: int, kind: str, budget_s: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They share rows and heads, rows and keys of decodes, or divide the KV cache; steps are cut by
    time or not. Of the requests one is scored, and one begins as another does. No YaRN temperature:
    with one a cached prefix depends on whose it was, which the schedule decides."""
    path = write_checkpoint(tmp_path, num_hidden_layers=LAYERS, dual_chunk_attention_config={
        **DCA, "original_max_position_embeddings": 4096})
    if kind == "sparse":  # decodes of any length, not only those worth it
        monkeypatch.setitem(shared_decode.LEAST_BYTES, "cpu", 1)
    plan, picked = (None, (0, 1, 2)) if kind == "dense" else (PLAN, (0, 1, 4))
    options = {"context_parallel": 2, "divides_kv": True} if kind == "divided" else {}
    alone = load(path, plan)
    rings.append(ring_of(path, plan, 2, 2, heads, **options))
    one = Answers(LocalTransport(alone), 12, 2, sparse=plan is not None)
    many = Answers(rings[0], 12, 2, sparse=plan is not None, budget_s=budget_s)
    for answers in (one, many):
        answers.requests = [answers.requests[index] for index in picked]
        answers.run()
    assert many.tokens == one.tokens
    for name, parts in one.scores.items():
        torch.testing.assert_close(logprobs_of(many.scores[name]), logprobs_of(parts),
                                   atol=1e-4, rtol=1e-4)
    assert many.num_cached > 0 and many.scores
    if budget_s is None:  # else others are cached
        assert many.pairs == pytest.approx(one.pairs, rel=1e-3)  # a near tie may go either way
        assert many.recalls.keys() == one.recalls.keys()
        assert bool(one.recalls) is (plan is not None)
        for name, sums in one.recalls.items():
            assert many.recalls[name][:2] == pytest.approx(sums[:2], rel=1e-3)
    for runner in rings[0].runners:
        sharing = runner.runner.sharing
        assert sharing is not None and isinstance(sharing.group, ThreadGroup)
        assert sharing.group.num_gathered > 3 or budget_s  # slices may be too short for that
        assert (sharing.group.num_merges > 4) is (kind != "dense")


def test_one_prompt_keeps_all_stages_busy(paths: dict[bool, Path], rings: list[Ring]) -> None:
    path = paths[True]
    rings.append(ring_of(path, None, 4))
    answers = Answers(rings[0], 0, 4, sparse=False)
    answers.requests = [make_request("a", [index % 250 for index in range(1000)], max_tokens=2)]
    answers.run()
    links = [runner._link for runner in rings[0].runners]
    assert all(isinstance(link, QueueLink) and link.num_sent >= 4 for link in links[:-1])
    assert rings[0].most_ahead >= 1  # later steps were at the first rank meanwhile
    assert isinstance(links[-1], QueueLink) and links[-1].num_sent == 2  # wanted rows alone


def test_ranks_have_their_own_layers_alone(paths: dict[bool, Path]) -> None:
    path = paths[False]
    edges: list[Queue[Tensor]] = [Queue() for _ in range(2)]
    first, last = (load(path, None, StagePlace(QueueLink(index, edges), layers))
                   for index, layers in enumerate(equal_split(LAYERS, 2)))
    names = [set(runner._stages[0].model.weight_targets()) for runner in (first, last)]
    assert not any(name.removeprefix("model.") == "norm.weight" for name in names[0])
    assert "model.embed_tokens.weight" in names[0] and "model.norm.weight" in names[1]
    assert "lm_head.weight" in names[0]
    assert not names[1] & {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(first.caches) == 2 and len(last.caches) == 3
