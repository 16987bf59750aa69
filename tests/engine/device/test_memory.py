"""Memory plan: sums, limits and one-line refusals."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longspan.config import DcaConfig, EngineConfig, ModelConfig
from longspan.engine.device.graphs import Compute, DecodeGraphs, DecodeState
from longspan.engine.device.memory import (
    SAMPLING_BYTES,
    DeviceMemory,
    MemoryPlan,
    device_memory,
    host_memory,
    plan_memory,
    workspace_bytes,
)
from longspan.errors import LongspanError, NotEnoughMemoryError
from longspan.units import GIB
from tests.doubles import MODEL

BIG = ModelConfig(**{
    **MODEL, "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_layers": 28, "num_heads": 28, "num_kv_heads": 4, "head_dim": 128,
    "max_position_embeddings": 1_010_000, "tie_word_embeddings": False})


def plan(free_gib: float, *, sparse: bool = False, **fields: Any) -> MemoryPlan:
    config = EngineConfig(**{
        "model": "m", "device": "cpu", "dtype": "bfloat16", "prefill_chunk_len": 32_768,
        "max_num_requests": 8, **fields})
    memory = DeviceMemory(total_bytes=int(2 * free_gib * GIB), free_bytes=int(free_gib * GIB))
    return plan_memory(BIG, config, max_step_tokens=32_768, means=sparse, device=memory)


def test_a_7b_model_reads_a_million_tokens_on_one_large_gpu() -> None:
    result = plan(139, sparse=True)
    assert 14 < result.weights_bytes / GIB < 14.5
    assert result.kv_bytes_per_token == 57_344 + 448
    assert result.max_model_len == 1_010_000
    assert result.needed_bytes < result.budget_bytes
    assert result.kv_bytes + result.weights_bytes + result.workspace_bytes <= result.budget_bytes


def test_the_length_shrinks_to_what_fits() -> None:
    result = plan(40)
    assert 0 < result.max_model_len == result.fitting_len < 1_010_000
    assert result.max_model_len % result.block_size == 0


def test_the_pool_of_a_cpu_is_sized_by_need() -> None:
    result = plan(139, max_model_len=1000)
    assert result.num_blocks == 4 * 8 and result.fitting_len > 500_000


def test_the_pool_of_a_gpu_takes_the_whole_budget() -> None:
    result = plan(130, device="cuda", max_model_len=131_072)
    assert result.num_blocks >= result.fitting_len // 128 > 4 * 1024
    used = result.weights_bytes + result.workspace_bytes + result.kv_bytes
    assert 0 <= result.budget_bytes - used < 128 * result.kv_bytes_per_token


def test_the_pool_of_a_gpu_holds_no_more_than_can_be_used() -> None:
    """All requests of full length, and as much again for the prefix cache."""
    result = plan(139, device="cuda:0", max_model_len=1000)
    assert result.num_blocks == 2 * 8 * 8
    assert plan(139, device="cuda", max_model_len=1000, max_num_requests=1).num_blocks == 2 * 8


def test_memory_gib_is_the_budget() -> None:
    assert plan(139, memory_gib=60).budget_bytes == 60 * GIB
    assert plan(10, max_model_len=100, memory_gib=18).budget_bytes == 18 * GIB


@pytest.mark.parametrize(("free", "fields", "remedies"), [
    (139, {"max_model_len": 8_000_000}, "lower max_model_len to"),
    (10, {}, "use a smaller model or a device with more memory"),
    (139, {"memory_gib": 10}, "raise memory_gib, or use a smaller model"),
    (20, {"dtype": "float32"}, "use dtype bfloat16, or use a smaller model"),
])
def test_what_does_not_fit_is_refused(free: float, fields: dict[str, Any], remedies: str) -> None:
    with pytest.raises(NotEnoughMemoryError, match=remedies) as error:
        plan(free, **fields)
    message = str(error.value)
    assert "\n" not in message and "weights" in message and "may use" in message


def test_workspace_grows_with_the_step() -> None:
    config = EngineConfig(model="m", device="cuda", dtype="bfloat16", max_num_requests=64)
    assert workspace_bytes(BIG, config, 1000) < workspace_bytes(BIG, config, 32_768) < 6 * GIB
    assert workspace_bytes(BIG, replace(config, dtype="float32"), 1000) > \
        workspace_bytes(BIG, config, 1000)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._num_tensors = Counter[int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage()
            self._num_tensors[storage.data_ptr()] += 1
            if self._num_tensors[storage.data_ptr()] == 1:
                self.now += storage.nbytes()
            weakref.finalize(tensor, self._forget, storage.data_ptr(), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _forget(self, place: int, num_bytes: int) -> None:
        self._num_tensors[place] -= 1
        if self._num_tensors[place] == 0:
            self.now -= num_bytes


@pytest.mark.parametrize("max_num_requests", [1, 5, 64, 500])
def test_decode_graphs_are_planned_for_on_gpus(max_num_requests: int) -> None:
    """What all graphs keep, and what a step needs besides: measured as the graphs are recorded."""
    model = replace(BIG, vocab_size=3000, max_position_embeddings=1000)
    config = EngineConfig(model="m", device="cuda", dtype="bfloat16", prefill_chunk_len=32_768,
                          max_num_requests=max_num_requests)
    zones = 2 * 28 * 128 * 2
    planned = (workspace_bytes(model, config, 1) - zones
               - workspace_bytes(model, replace(config, device="cpu"), 1))
    state = DecodeState(torch.zeros(max_num_requests + 1, dtype=torch.int64), max_blocks=8,
                        block_size=128, head_dim=128, dca=None)
    live, kept, scratch = LiveBytes(), list[Any](), list[int]()

    def record(step: Compute) -> Compute:
        before = live.peak = live.now
        kept.append(step())
        scratch.append(live.peak - before)
        return step

    with live:
        graphs = DecodeGraphs(lambda ids, _: torch.ones(len(ids), 3000), state, record)
        graphs.record_all(max_num_requests)
    sampling = SAMPLING_BYTES * 3000 * max(len(output.token_ids) for output in kept)
    assert planned == sum(output.logits.nbytes for output in kept) + sampling
    assert max(scratch) <= sampling < 1.4 * max(scratch)


def test_rotation_tables_are_as_long_as_the_context_without_dca() -> None:
    config = EngineConfig(model="m", device="cuda", dtype="bfloat16", max_num_requests=64)
    dca = replace(BIG, dca=DcaConfig(chunk_size=262_144, local_size=8192))
    difference = workspace_bytes(BIG, config, 1000) - workspace_bytes(dca, config, 1000)
    assert difference == 4 * 128 * (1_010_000 - 262_145)


def test_this_machine_has_memory() -> None:
    memory = device_memory("cpu")
    assert 0 < memory.free_bytes <= memory.total_bytes


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LongspanError, match="cuda:2 is not there; the last GPU .* is cuda:1"):
        device_memory("cuda:2")


def test_container_limits_count(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/slice/unit\n")
    unit = tmp_path / "slice" / "unit"
    unit.mkdir(parents=True)
    (unit / "memory.max").write_text("max\n")
    (unit / "memory.current").write_text("5\n")
    (tmp_path / "slice" / "memory.max").write_text("3000\n")
    (tmp_path / "slice" / "memory.current").write_text("1000\n")
    (tmp_path / "slice" / "memory.stat").write_text("inactive_file 100\nactive_file 50\nanon 7\n")
    assert host_memory(tmp_path, own) == DeviceMemory(total_bytes=3000, free_bytes=2150)


def test_container_limits_of_version_1_count(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("4000\n")
    (folder / "memory.usage_in_bytes").write_text("5000\n")
    assert host_memory(tmp_path, tmp_path / "no such") == DeviceMemory(
        total_bytes=4000, free_bytes=0)


@pytest.mark.parametrize(("max_model_len", "step_tokens"), [
    (1, 8), (1_000, 8_000), (4_096, 32_768), (9_000, 32_768)])
def test_a_step_of_many_short_prompts_is_planned_for(max_model_len: int, step_tokens: int) -> None:
    """Several prompts are computed in one step: each of the 8 requests may bring all of its own."""
    config = EngineConfig(model="m", device="cpu", dtype="bfloat16", max_num_requests=8)
    assert plan(139, max_model_len=max_model_len).workspace_bytes == workspace_bytes(
        BIG, config, step_tokens, max_model_len)
