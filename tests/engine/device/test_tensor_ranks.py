"""Runners that share heads and widths: the answers of one rank, through scheduler, prefix cache and
chunks in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan.attention.ranks import RankGroup
from longspan.attention.sparsity import SparsityPlan
from longspan.engine.device.runner import Runner
from longspan.engine.device.stage import StagePlace
from tests.doubles import EXPERTS, write_checkpoint
from tests.engine.device.rank_threads import ThreadRanks
from tests.engine.device.runners import load_runner
from tests.engine.device.test_ranks import LONG_DCA, PLAN, Alone, Answers, Together

LAYERS, HEADS, KV_HEADS = 3, 8, 4
SHAPE: dict[str, Any] = {
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "hidden_size": 64, "dual_chunk_attention_config": LONG_DCA}
# of the first layer two neighbours keep most: in order they would be one rank's; some rank's heads
# keep all diagonals for longer than another's
UNEVEN = replace(
    PLAN, vertical=((64, 64, 48, 48, 8, 8, 8, 8), (8,) * HEADS, (8, 8, 64, 64, 64, 64, 8, 8)),
    slash=((96,) * 4 + (32,) * 2 + (96,) * 2, (48,) * HEADS, (64,) * HEADS))


@pytest.fixture(scope="module", params=["untied", "tied", "experts"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param == "tied", **SHAPE,
        **EXPERTS if request.param == "experts" else {})


def load(path: Path, plan: SparsityPlan | None, heads: RankGroup | None = None) -> Runner:
    return load_runner(path, plan, 160, StagePlace(heads=heads))


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[ThreadRanks]:
    ranks = ThreadRanks(request.param)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("threads", [2, 4], indirect=True)
def test_any_number_of_ranks_gives_the_answers_of_one(
    path: Path, threads: ThreadRanks, is_sparse: bool,
) -> None:
    plan = UNEVEN if is_sparse else None
    alone = load(path, plan)
    together = Together(threads, threads.run(
        lambda rank: load(path, plan, threads.groups[rank])))
    one, all_ranks = (Answers(launcher, len(threads.groups), is_sparse)
                      for launcher in (Alone(alone), together))
    one.run()
    all_ranks.run()
    assert all_ranks.tokens == one.tokens
    assert all_ranks.pairs == pytest.approx(one.pairs, rel=1e-3)  # a near tie may go either way
    assert one.num_cached > 0
    size = len(threads.groups)
    for group, runner in zip(threads.groups, together.runners, strict=True):
        assert group.num_sums > 2 * LAYERS
        assert all(cache.k.shape[2] == KV_HEADS // size for cache in runner.caches)


def test_ranks_hold_their_share_of_the_weights(path: Path) -> None:
    threads = ThreadRanks(2)
    alone = load(path, UNEVEN)._stages[0].model
    found = [runner._stages[0].model for runner in threads.run(
        lambda rank: load(path, UNEVEN, threads.groups[rank]))]
    threads.close()
    whole = sum(part.numel() for part in alone.parameters())
    shared = sum(part.numel() for name, part in alone.named_parameters()
                 if name.endswith(("proj.weight", "up.weight", "down.weight"))
                 or name == "lm_head.weight" and not alone.config.tie_word_embeddings)
    for model in found:
        held = sum(part.numel() for part in model.parameters())
        assert held < whole - shared / 2 + 2000  # biases are shared too, but for two
    assert [model.share.kv_heads for model in found if model.share] == [
        ((0, 2), (0, 1), (0, 1)), ((1, 3), (2, 3), (2, 3))]
