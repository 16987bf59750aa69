"""Ranks on one GPU: as threads that hand tensors over, and one with NCCL's collectives in
graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from longspan.attention import ranks, shared_decode
from longspan.attention.ranks import RankGroup, RowSharing
from longspan.attention.sparsity import SparsityPlan, needs_means
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.device.memory import DeviceMemory, plan_memory
from longspan.engine.device.runner import Runner
from longspan.engine.device.stage import StagePlace
from longspan.engine.resolve import resolve_positions
from longspan.ops import decode
from longspan.ops.tiles.attend import merge
from longspan.ops.types import PagedKV, QueryRotary
from tests.conftest import assert_close
from tests.doubles import write_checkpoint
from tests.engine.device.rank_threads import ThreadRanks
from tests.engine.device.runners import BLOCK, CHUNK, LENGTH, PIECE_ROWS
from tests.engine.device.test_ranks import PLAN, Alone, Answers, Together

pytestmark = pytest.mark.gpu
HEADS, LAYERS = 8, 3
EVEN = replace(PLAN, vertical=((24,) * HEADS,) * LAYERS, slash=((48,) * HEADS,) * LAYERS)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=4, hidden_size=512, tie_word_embeddings=False,
        dual_chunk_attention_config={"chunk_size": 640, "local_size": 128,
                                     "original_max_position_embeddings": 160})


def load(
    path: Path, plan: SparsityPlan | None, *, rows: RankGroup | None = None,
    heads: RankGroup | None = None, divided: RankGroup | None = None,
) -> Runner:
    config = EngineConfig(
        model=str(path), device="cuda", dtype="float32", prefill_chunk_len=CHUNK,
        block_size=BLOCK, max_model_len=LENGTH, max_num_requests=8, divides_kv=divided is not None,
        context_parallel=1 if divided is None else divided.size)
    rows = rows or divided
    model = ModelConfig.from_dir(path)
    memory = plan_memory(model, config, max_step_tokens=2 * CHUNK, means=needs_means(plan),
                         device=DeviceMemory(total_bytes=2**34, free_bytes=2**34))
    runner = Runner.load(path, model, config, replace(memory, num_blocks=160), plan=plan,
                         dca=resolve_positions("auto", model), place=StagePlace(heads=heads))
    if rows is not None:
        runner.use_group(rows, plan)
    runner.clear_caches()
    runner._chunk._rows = PIECE_ROWS
    return runner


def answers(launcher: Any, is_sparse: bool) -> tuple[dict[str, list[int]], list[float]]:
    found = Answers(launcher, 5, is_sparse)
    found.run()
    return found.tokens, found.pairs


@pytest.mark.parametrize("shares", ["rows", "heads", "divided"])
@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
def test_two_ranks_answer_as_one(
    path: Path, is_sparse: bool, shares: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(shared_decode.LEAST_BYTES, "cuda", 1)
    monkeypatch.setitem(ranks.LEAST_ROWS, "cuda", 0)
    plan, threads = EVEN if is_sparse else None, ThreadRanks(2)
    wanted, wanted_pairs = answers(Alone(load(path, plan)), is_sparse)
    # a group of one compiles what ranks take besides: Triton's compiler is not made for two threads
    one = ThreadRanks(1)
    alone = one.run(lambda rank: load(path, plan, **{shares: one.groups[rank]}))
    alone[0]._graphs = None
    assert answers(Together(one, alone), is_sparse)[0] == wanted
    one.close()
    runners = threads.run(lambda rank: load(path, plan, **{shares: threads.groups[rank]}))
    for runner in runners:
        runner._graphs = None  # threads cannot hand tensors over while they record
    tokens, pairs = answers(Together(threads, runners), is_sparse)
    threads.close()
    assert tokens == wanted
    assert pairs == pytest.approx(wanted_pairs, rel=1e-2)


@pytest.fixture
def nccl() -> Iterator[None]:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1,
                            device_id=torch.device("cuda:0"))
    yield
    dist.destroy_process_group()


def test_collectives_are_recorded_in_decode_graphs(
    path: Path, nccl: None, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A group of one: sums, gatherings and merges are NCCL's, eager and replayed."""
    monkeypatch.setitem(shared_decode.LEAST_BYTES, "cuda", 1)
    monkeypatch.setitem(ranks.LEAST_ROWS, "cuda", 0)
    wanted, _ = answers(Alone(load(path, EVEN)), True)
    group = RankGroup(0, 1)
    runner = load(path, EVEN, rows=group, heads=group)
    tokens, _ = answers(Alone(runner), True)
    assert tokens == wanted
    assert runner._graphs is not None and runner._graphs.num_graphs > 0
    runner.record_graphs()
    assert runner._graphs.num_graphs >= 2 * 2 * 4


def test_parts_of_a_long_context_merge_to_the_whole() -> None:
    """And each takes its share of the time."""
    num_blocks, table_len = 4096, 4096
    k, v = (torch.randn(num_blocks, 128, 4, 128, device="cuda", dtype=torch.bfloat16)
            for _ in range(2))
    cache = PagedKV(k, v)
    angles = torch.rand(262_144, 64, device="cuda")
    rotary = QueryRotary(
        angles.cos(), angles.sin(), torch.zeros(64, device="cuda"), 229_376, 262_143)
    q = torch.randn(1, 28, 128, device="cuda", dtype=torch.bfloat16)
    lens = torch.tensor([num_blocks * 128 - 77], device="cuda")
    args = (q, cache, torch.arange(table_len, device="cuda")[None], lens, rotary,
            torch.tensor([0.088], device="cuda"))
    whole, whole_lse = decode.decode_attention(*args)
    spans = [shared_decode.share_keys(RowSharing(RankGroup(rank, 2), 128, 1), lens, 128).spans
             for rank in range(2)]
    out, lse = merge([decode.decode_attention(*args, span) for span in spans])
    assert_close(out.bfloat16(), whole)
    assert_close(lse, whole_lse, "lse")
    times = [milliseconds(lambda: decode.decode_attention(*args)),
             *(milliseconds(partial(decode.decode_attention, *args, span)) for span in spans)]
    print("whole, halves, ms:", [f"{each:.3f}" for each in times])
    assert max(times[1:]) < 0.6 * times[0]


def milliseconds(task: Any) -> float:
    task()
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(20):
        task()
    ended.record()
    torch.cuda.synchronize()
    return float(begun.elapsed_time(ended)) / 20
