"""Routed experts, compiled: sizes of Qwen3-30B-A3B, no waits, CUDA graphs, and all ways agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longspan import ops
from longspan.expert_config import ExpertConfig
from longspan.model.experts import RoutedMLP
from longspan.ops.moe import eager, grouped
from longspan.ops.moe import triton as kernels
from tests.conftest import assert_close
from tests.gpu import test_sync_free
from tests.gpu.syncs import no_syncs

pytestmark = pytest.mark.gpu
CONFIG = ExpertConfig(num_experts=128, num_chosen=8, expert_size=768, is_normed=True)
DIM = 2_048


def make(config: ExpertConfig = CONFIG, dim: int = DIM) -> RoutedMLP:
    mlp = RoutedMLP(dim, config, dtype=torch.bfloat16, device="cuda")
    for parameter in mlp.parameters():
        parameter.normal_(0.0, 0.02)
    return mlp


def expected(mlp: RoutedMLP, hidden: Tensor, x: Tensor) -> Tensor:
    """The same in fp32, expert by expert."""
    sums = hidden.float()
    weights, experts = ops.reference.route(
        x.float() @ mlp.gate.weight.float().t(), mlp.num_chosen, mlp.is_normed)
    eager.add_routed_mlp(sums, x.float(), weights, experts, mlp.experts.gate_up_proj.float(),
                         mlp.experts.down_proj.float())
    return sums


@pytest.mark.parametrize("num_tokens", [1, 3, 64, 333, 4_096, 16_384])
def test_a_layer_of_experts(num_tokens: int) -> None:
    mlp = make()
    hidden, x = (torch.randn(num_tokens, DIM, device="cuda", dtype=torch.bfloat16)
                 for _ in range(2))
    wanted = expected(mlp, hidden, x)
    with torch.inference_mode():
        mlp.add_to(hidden.clone(), x)  # compiles what is compiled
        with no_syncs():
            mlp.add_to(hidden, x)
    assert_close(hidden, wanted)


@pytest.mark.parametrize("num_tokens", [7, 512, 4_096])
def test_all_ways_agree(num_tokens: int) -> None:
    mlp = make()
    x = torch.randn(num_tokens, DIM, device="cuda", dtype=torch.bfloat16)
    weights, experts = ops.route(mlp.logits(x), 8, True)
    matrices = (mlp.experts.gate_up_proj, mlp.experts.down_proj)
    wanted = torch.zeros(num_tokens, DIM, device="cuda")
    eager.add_routed_mlp(wanted, x.float(), weights, experts, *(m.float() for m in matrices))
    for way in (kernels, grouped, eager):
        sums = torch.zeros_like(x)
        way.add_routed_mlp(sums, x, weights, experts, *matrices)
        assert_close(sums, wanted)


def test_a_graph_reads_what_its_tokens_take() -> None:
    """Recorded for some tokens, replayed for others."""
    mlp = make(replace(CONFIG, shared_size=512))
    hidden, x = (torch.randn(5, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with torch.inference_mode():
        mlp.add_to(hidden.clone(), x)
        graph, sums = torch.cuda.CUDAGraph(), torch.empty_like(hidden)
        with torch.cuda.graph(graph):
            sums.copy_(hidden)
            mlp.add_to(sums, x)
        for _ in range(3):
            hidden.normal_()
            x.normal_()
            graph.replay()
            alone = hidden.clone()
            mlp.add_to(alone, x)
            assert torch.equal(sums, alone)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_no_step_of_a_model_of_experts_waits(
    sparse: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = ExpertConfig(num_experts=16, num_chosen=4, expert_size=128, shared_size=256)
    monkeypatch.setattr(test_sync_free, "MODEL", replace(test_sync_free.MODEL, experts=experts))
    test_sync_free.test_no_step_waits_for_the_device(sparse, test_sync_free.PLAN)
