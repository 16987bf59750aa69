"""Routed experts with PyTorch against the specification, and that against transformers."""

from __future__ import annotations

import pytest
import torch

from longspan.ops import reference
from longspan.ops.moe import eager
from tests.conftest import assert_close

SHAPES = [(1, 8, 1, 16, 8), (5, 4, 4, 24, 16), (37, 7, 3, 16, 24), (64, 128, 8, 32, 16)]
"""Tokens, experts, chosen ones, model dim, width."""


def make_case(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str = "cpu",
) -> tuple[torch.Tensor, ...]:
    """sums, x, weights, experts, gate_up, down: some experts have no token, some many."""
    num_tokens, num_experts, num_chosen, dim, width = shape
    logits = torch.randn(num_tokens, num_experts, device=device)
    logits[:, : num_experts // 2] += 1.0
    weights, experts = reference.route(logits, num_chosen, True)
    sums, x = (torch.randn(num_tokens, dim, device=device).to(dtype) for _ in range(2))
    gate_up = (torch.randn(num_experts, 2 * width, dim, device=device) * dim**-0.5).to(dtype)
    down = (torch.randn(num_experts, dim, width, device=device) * width**-0.5).to(dtype)
    return sums, x, weights, experts, gate_up, down


def without_some(case: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The same where another rank has the last third of the experts."""
    sums, x, weights, experts, gate_up, down = case
    count = gate_up.shape[0] - gate_up.shape[0] // 3
    is_elsewhere = experts >= count
    assert is_elsewhere.any() and not is_elsewhere.all()
    return (sums, x, weights.masked_fill(is_elsewhere, 0.0),
            experts.masked_fill(is_elsewhere, count), gate_up[:count], down[:count])


@pytest.mark.parametrize("is_normed", [False, True])
def test_routing_is_that_of_transformers(is_normed: bool) -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    router = Qwen3MoeTopKRouter(Qwen3MoeConfig(
        hidden_size=16, num_experts=9, num_experts_per_tok=4, norm_topk_prob=is_normed))
    torch.nn.init.normal_(router.weight)
    x = torch.randn(33, 16)
    logits, wanted, chosen = router(x)
    weights, experts = reference.route(logits, 4, is_normed)
    assert torch.equal(experts, chosen) and torch.equal(weights, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_are_added(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    case = make_case(shape, dtype)
    expected, sums = case[0].clone(), case[0].clone()
    reference.add_routed_mlp(expected, *case[1:])
    eager.add_routed_mlp(sums, *case[1:])
    assert_close(sums, expected)
    assert not torch.equal(sums, case[0])


def test_experts_that_are_elsewhere_add_nothing() -> None:
    """They leave out what the others add up to."""
    case = make_case(SHAPES[2], torch.float32)
    part, whole = without_some(case), case[0].clone()
    reference.add_routed_mlp(whole, *case[1:])
    expected, sums = case[0].clone(), case[0].clone()
    reference.add_routed_mlp(expected, *part[1:])
    eager.add_routed_mlp(sums, *part[1:])
    assert_close(sums, expected)
    count = part[4].shape[0]
    is_here = case[3] < count
    reference.add_routed_mlp(
        expected, case[1], case[2].masked_fill(is_here, 0.0),
        (case[3] - count).masked_fill(is_here, case[4].shape[0] - count), case[4][count:],
        case[5][count:])
    assert_close(expected, whole)


def test_a_token_is_the_same_in_any_company() -> None:
    """Sums are in the order of the token's own choice, whatever else is in the step."""
    case = make_case((40, 7, 3, 16, 24), torch.float32)
    whole, alone = case[0].clone(), case[0][7:8].clone()
    eager.add_routed_mlp(whole, *case[1:])
    eager.add_routed_mlp(alone, *(part[7:8] for part in case[1:4]), *case[4:])
    assert_close(alone, whole[7:8])
