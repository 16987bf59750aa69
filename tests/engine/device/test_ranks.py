"""Runners that share prefill: every rank's numbers are those of one rank alone."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.attention import shared_decode
from longspan.attention.ranks import RankGroup
from longspan.attention.sparsity import SparsityPlan
from longspan.engine.control.loop import Loop
from longspan.engine.control.scheduler import Scheduler, SchedulerConfig
from longspan.engine.control.transport import LocalTransport
from longspan.engine.device.runner import Runner
from longspan.engine.request import Request
from longspan.engine.step import RowSampling, ScheduledBatch, ScheduledSlice
from longspan.model import CausalLM
from tests.doubles import ComputedStep, make_request, write_checkpoint
from tests.engine.device.rank_threads import ThreadRanks
from tests.engine.device.runners import (
    BLOCK,
    CHUNK,
    LENGTH,
    PIECE_ROWS,
    RELEASED,
    fill_history,
    load_runner,
)

LAYERS, HEADS = 3, 4
SHORT_DCA: dict[str, Any] = {
    "chunk_size": 192, "local_size": 64, "original_max_position_embeddings": 160}
LONG_DCA = {**SHORT_DCA, "chunk_size": 640, "local_size": 128}
PLAN = replace(SparsityPlan.default(LAYERS, HEADS, vertical=24, slash=48), num_scouts=4,
               most_scouts=16, scout_tiles=2, probe_last=8, probe_strided=4, tail_len=64,
               mean_near_len=128)


@pytest.fixture(scope="module", params=["rope", "short", "long"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dca = {"rope": None, "short": SHORT_DCA, "long": LONG_DCA}[request.param]
    return write_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS,
                            dual_chunk_attention_config=dca)


def load(
    path: Path, plan: SparsityPlan | None, group: RankGroup | None = None, **options: Any,
) -> Runner:
    runner = load_runner(path, plan, 160, **options)
    if group is not None:
        runner.use_group(group, plan)
    for cache in runner.caches:
        for part in cache:
            if part is not None:
                part.zero_()  # so that whole caches can be compared
    return runner


@dataclass
class Together:
    """Launches every step on all ranks, which must come to the same."""

    ranks: ThreadRanks
    runners: list[Runner]

    def launch(self, batch: ScheduledBatch) -> ComputedStep:
        results = self.ranks.run(lambda rank: self.runners[rank].execute(batch))
        first = results[0]
        for other in results[1:]:
            assert other.token_ids == first.token_ids
            assert (other.kept_pairs, other.causal_pairs) == (
                first.kept_pairs, first.causal_pairs)
        return ComputedStep(first)

    def check_caches(self) -> None:
        """Every rank has written the same keys, values and means."""
        for rank in self.runners[1:]:
            for own, lead in zip(rank.caches, self.runners[0].caches, strict=True):
                for one, other in zip(own, lead, strict=True):
                    assert one is None or other is None or torch.equal(one, other)


@dataclass
class Alone:
    """One rank."""

    runner: Runner

    def launch(self, batch: ScheduledBatch) -> ComputedStep:
        return ComputedStep(self.runner.execute(batch))


class Answers:
    """Random requests through scheduler and loop: shared prefixes, batches, chunks in pieces."""

    def __init__(self, launcher: Any, seed: int, is_sparse: bool) -> None:
        rng = random.Random(seed)
        self.loop = Loop(Scheduler(SchedulerConfig(
            num_blocks=160, block_size=BLOCK, max_model_len=LENGTH, prefill_chunk_len=CHUNK,
            max_num_requests=4, num_layers=LAYERS, piece_rows=PIECE_ROWS, unit_len=BLOCK,
            tail_len=PLAN.tail_len if is_sparse else 0,
            step_budget_s=rng.choice([None, 0.02]))), LocalTransport(launcher))
        stem = [rng.randrange(256) for _ in range(700)]
        stems = [600, *(rng.choice([0, 300, 600]) for _ in range(4)), 600]  # the last one: a hit
        self.tokens = dict[str, list[int]]()
        self.pairs, self.num_cached = [0.0, 0.0], 0
        self.requests = [make_request(
            str(index), [*stem[: stems[index]],
                         *(rng.randrange(256) for _ in range(rng.choice([5, 90, 330])))],
            sparse=is_sparse and rng.random() < 0.7, max_tokens=4, ignore_eos=True)
            for index in range(6)]

    def run(self) -> None:
        self._answer(self.requests[:-1])
        self._answer(self.requests[-1:])
        self.num_cached = sum(request.num_cached_tokens for request in self.requests)

    def _answer(self, requests: list[Request]) -> None:
        for request in requests:
            self.tokens[request.request_id] = []
            self.loop.add(request)
        while not self.loop.is_idle:
            report = self.loop.turn()
            self.pairs = [self.pairs[0] + report.kept_pairs, self.pairs[1] + report.causal_pairs]
            for update in report.updates:
                assert not update.failure
                if update.token_id is not None:
                    self.tokens[update.request_id].append(update.token_id)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[ThreadRanks]:
    ranks = ThreadRanks(request.param)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("threads", [2, 3, 4], indirect=True)
def test_any_number_of_ranks_gives_the_answers_of_one(
    path: Path, threads: ThreadRanks, is_sparse: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares_keys = len(threads.groups) > 2
    if shares_keys:  # decodes of any length, not only those worth it
        monkeypatch.setitem(shared_decode.LEAST_BYTES, "cpu", 1)
    plan = PLAN if is_sparse else None
    alone = load(path, plan)
    together = Together(threads, threads.run(
        lambda rank: load(path, plan, threads.groups[rank])))
    one, all_ranks = (Answers(launcher, len(threads.groups), is_sparse)
                      for launcher in (Alone(alone), together))
    one.run()
    all_ranks.run()
    assert all_ranks.tokens == one.tokens
    assert all_ranks.pairs == pytest.approx(one.pairs, rel=1e-3)  # a near tie may go either way
    together.check_caches()
    assert one.num_cached > 0
    assert all((group.num_exchanges > 0) is is_sparse and group.num_gathered > 10
               for group in threads.groups)
    assert all((group.num_merges > 10) is shares_keys for group in threads.groups)


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("threads", [2, 4], indirect=True)
def test_ranks_that_divide_the_cache_give_the_answers_of_one(
    path: Path, threads: ThreadRanks, is_sparse: bool,
) -> None:
    """Each holds its part of every block, and no more."""
    plan, size = PLAN if is_sparse else None, len(threads.groups)
    alone = load(path, plan)
    together = Together(threads, threads.run(lambda rank: load(
        path, plan, threads.groups[rank], context_parallel=size, divides_kv=True)))
    one, all_ranks = (Answers(launcher, 7 + size, is_sparse)
                      for launcher in (Alone(alone), together))
    one.run()
    all_ranks.run()
    assert all_ranks.tokens == one.tokens
    assert all_ranks.pairs == pytest.approx(one.pairs, rel=1e-3)
    assert one.num_cached > 0
    assert all(group.num_merges > 10 for group in threads.groups)
    for runner in together.runners:
        for cache, whole in zip(runner.caches, alone.caches, strict=True):
            assert cache.k.numel() * size == whole.k.numel() and cache.k_mean is None


@pytest.mark.parametrize("dca", RELEASED)
def test_ranks_share_rows_and_keys_behind_released_strides(
    tmp_path: Path, dca: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sparse chunk across the border of the second DCA chunk, and decodes behind it. A few blocks
    are the history, again and again."""
    monkeypatch.setitem(shared_decode.LEAST_BYTES, "cpu", 1)
    write_checkpoint(tmp_path, num_hidden_layers=2, dual_chunk_attention_config=dca,
                     num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1 << 20)
    vertical, slash = (tuple(part[:2] for part in each[:2]) for each in (PLAN.vertical, PLAN.slash))
    plan = replace(PLAN, vertical=vertical, slash=slash)
    border, history, own = 2 * (dca["chunk_size"] - dca["local_size"]), list(range(32)), 64
    begin, end = border - own, border + own
    blocks = [history[index * 7 % 32] for index in range(begin // BLOCK)] + list(range(40, 50))
    sampling = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
    steps = [ScheduledSlice(
        request_id="a", token_ids=array("i", [start % 251 + row for row in range(count)]),
        cached_len=start, prompt_len=end, block_ids=blocks, sparse=count > 1, sampling=sampling)
        for start, count in ((begin, 2 * own), (end, 1), (end + 1, 1))]

    def answer(launcher: Any, runners: list[Runner]) -> tuple[list[Any], list[torch.Tensor]]:
        for runner in runners:
            fill_history(runner, history)
        tokens = [launcher.launch(ScheduledBatch(step_id=0, slices=(step,))).wait().token_ids
                  for step in steps]
        return tokens, [torch.stack([part[40:49].flatten(0, 1)[: 2 * own + 2]
                                     for cache in runner.caches for part in (cache.k, cache.v)])
                        for runner in runners]

    alone, threads = load(tmp_path, plan, max_model_len=1 << 20), ThreadRanks(2)
    together = Together(threads, threads.run(
        lambda rank: load(tmp_path, plan, threads.groups[rank], max_model_len=1 << 20)))
    tokens, (keys,) = answer(Alone(alone), [alone])
    found, found_keys = answer(together, together.runners)
    threads.close()
    assert found == tokens and all(group.num_exchanges > 0 for group in threads.groups)
    assert all(group.num_merges > 0 for group in threads.groups)
    assert torch.equal(*found_keys) and not keys.isnan().any()
    torch.testing.assert_close(found_keys[0], keys, rtol=0, atol=2e-3)


def test_ranks_share_selections_without_columns(path: Path) -> None:
    """No head keeps any: what the ranks gather has a part of width 0."""
    plan = replace(PLAN, vertical=tuple((0,) * HEADS for _ in range(LAYERS)))
    threads = ThreadRanks(2)
    one, together = (Answers(launcher, 3, True) for launcher in (
        Alone(load(path, plan)), Together(threads, threads.run(
            lambda rank: load(path, plan, threads.groups[rank])))))
    one.run()
    together.run()
    threads.close()
    assert together.tokens == one.tokens
    assert all(group.num_exchanges > 0 for group in threads.groups)


def test_tokens_are_those_of_the_first_rank(path: Path) -> None:
    """Whatever another one has sampled: its rounding may differ."""
    threads = ThreadRanks(2)
    runners = threads.run(lambda rank: load(path, None, threads.groups[rank]))
    model = runners[1]._stages[-1].model
    model.logits = lambda hidden: CausalLM.logits(model, hidden).flip(-1)  # type: ignore[method-assign]
    answers = Answers(Together(threads, runners), 2, False)
    answers.run()
    alone = Answers(Alone(load(path, None)), 2, False)
    alone.run()
    threads.close()
    assert answers.tokens == alone.tokens
    assert torch.equal(runners[0]._last_tokens, runners[1]._last_tokens)
