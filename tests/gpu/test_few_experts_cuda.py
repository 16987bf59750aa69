"""A decode step's experts, compiled: the kernels for few tokens, at sizes of Qwen3-30B-A3B."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.ops import pointwise, reference
from longspan.ops.moe import eager, triton_few, triton_router
from longspan.ops.quant.triton_few import arrivals
from longspan.ops.tiles.dependent_launch import early_launch
from longspan.ops.types import Fp8Weights
from tests.conftest import assert_close
from tests.gpu.syncs import no_syncs
from tests.gpu.test_experts_cuda import make_routed, poisoned, rounded_stack

pytestmark = pytest.mark.gpu
SIZES = [(128, 8, 2_048, 768), (60, 4, 2_048, 1_408), (9, 3, 136, 104)]
"""Experts, chosen ones, model dim, width; the second as Qwen1.5-MoE has them."""
BATCHES = [1, 2, 5, 8]


def expected(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor,
) -> Tensor:
    sums = torch.zeros(x.shape, device="cuda")
    eager.add_routed_mlp(sums, x.float(), weights, experts.long(), gate_up.float(), down.float())
    return sums


@pytest.mark.parametrize("kind", ["some", "elsewhere"])
@pytest.mark.parametrize("num_tokens", BATCHES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_experts_of_few_tokens(
    sizes: tuple[int, int, int, int], num_tokens: int, kind: str,
) -> None:
    """Whatever stands in memory, without waiting, and twice the same."""
    x, *rest = make_routed((num_tokens, *sizes), kind)
    sums, again = torch.zeros_like(x), torch.zeros_like(x)
    with poisoned():
        triton_few.add_routed_mlp(sums, x, *rest)
        with no_syncs():
            triton_few.add_routed_mlp(again, x, *rest)
    assert_close(sums, expected(x, *rest))
    assert torch.equal(sums, again) and not arrivals(x.device).any()


@pytest.mark.parametrize("num_tokens", BATCHES)
def test_experts_of_fp8(num_tokens: int) -> None:
    x, weights, experts, gate_up, down = make_routed((num_tokens, *SIZES[0]), "some")
    up, back = rounded_stack(gate_up), rounded_stack(down)
    assert isinstance(up, Fp8Weights)
    sums = torch.zeros_like(x)
    triton_few.add_routed_mlp(sums, x, weights, experts, up, back)
    assert_close(sums, expected(x, weights, experts, up.dense(), back.dense()))


@pytest.mark.parametrize("num_tokens", [*BATCHES, 16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_router(sizes: tuple[int, int, int, int], num_tokens: int) -> None:
    num_experts, num_chosen, dim, _ = sizes
    x = torch.randn(num_tokens, dim, device="cuda").bfloat16()
    router = (torch.randn(num_experts, dim, device="cuda") * 2 * dim**-0.5).bfloat16()
    with poisoned():
        weights, experts = triton_router.route_rows(x, router, num_chosen, True)
    wanted, chosen = reference.route_rows(x.double(), router.double(), num_chosen, True)
    # two logits that differ by a rounding may change places
    assert (experts.long() == chosen).float().mean() >= 0.98
    assert_close(weights, wanted.float())
    assert not arrivals(x.device).any()


@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_steps_in_a_graph(num_tokens: int) -> None:
    """Many layers one behind the other, where kernels begin early and take memory that the ones
    before have just left: what they read is never overwritten. Behind a copy, too."""
    num_experts, num_chosen, dim, width = SIZES[0]
    _, _, _, gate_up, down = make_routed((num_tokens, *SIZES[0]), "some")
    router = (torch.randn(num_experts, dim, device="cuda") * 2 * dim**-0.5).bfloat16()
    x, hidden = (torch.randn(num_tokens, dim, device="cuda").bfloat16() for _ in range(2))
    rows, sums, ones = x.clone(), hidden.clone(), torch.ones_like(x[0])

    def layers() -> None:
        rows.copy_(x)
        sums.copy_(hidden)
        for _ in range(12):
            chosen = triton_router.route_rows(rows, router, num_chosen, True)
            triton_few.add_routed_mlp(sums, rows, *chosen, gate_up, down)
            rows.copy_(sums / sums.float().square().mean(1, keepdim=True).sqrt())
            # no kernel between: the next one begins while the products end
            chosen = triton_router.route_rows(rows, router, num_chosen, True)
            triton_few.add_routed_mlp(sums, rows, *chosen, gate_up, down)
            chosen = triton_router.route_rows(sums, router, num_chosen, True)
            triton_few.add_routed_mlp(sums, rows, *chosen, gate_up, down)
            normed = pointwise.rms_norm(sums, ones, 1e-6)  # as in a model
            chosen = triton_router.route_rows(normed, router, num_chosen, True)
            triton_few.add_routed_mlp(sums, normed, *chosen, gate_up, down)

    def one_by_one() -> Tensor:
        """The same with nothing on the way beside it."""
        with pytest.MonkeyPatch.context() as patch:
            for module in (pointwise, triton_few, triton_router):
                patch.setattr(module, "early_launch", lambda device: {"EARLY": False})
            layers()
        return sums.clone()

    layers()
    assert early_launch(x.device)["EARLY"] is (torch.cuda.get_device_capability() >= (9, 0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    for _ in range(20):
        x.normal_()
        hidden.normal_()
        wanted = one_by_one()
        assert wanted.isfinite().all()
        for _ in range(3):
            sums.zero_()
            graph.replay()
            assert torch.equal(sums, wanted)
