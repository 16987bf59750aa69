"""The router of a few tokens, in one launch, against the specification."""

from __future__ import annotations

import pytest
import torch

from longspan.ops import reference
from longspan.ops.moe import triton_router as kernel
from longspan.ops.quant.triton_few import arrivals
from tests.conftest import assert_close


def make(
    num_tokens: int, num_experts: int, dim: int, device: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(num_tokens, dim, device=device).bfloat16()
    return x, (torch.randn(num_experts, dim, device=device) * 3 * dim**-0.5).bfloat16()


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen", "dim"), [
    (1, 128, 8, 64), (3, 60, 4, 72), (2, 9, 9, 48), (16, 7, 1, 40), (1, 1, 1, 16), (0, 8, 2, 16)])
def test_tokens_are_routed(
    num_tokens: int, num_experts: int, num_chosen: int, dim: int, is_normed: bool,
    monkeypatch: pytest.MonkeyPatch, kernel_device: str,
) -> None:
    """Also where the inputs are no whole number of steps."""
    monkeypatch.setattr(kernel, "DEPTH", 32)
    x, router = make(num_tokens, num_experts, dim, kernel_device)
    weights, experts = kernel.route_rows(x, router, num_chosen, is_normed)
    wanted, chosen = reference.route_rows(x, router, num_chosen, is_normed)
    assert experts.dtype == torch.int32 and torch.equal(experts.long(), chosen)
    if num_tokens:
        assert_close(weights, wanted)
    assert not arrivals(x.device).any()  # the next launch counts from 0


def test_a_token_is_the_same_in_any_company(kernel_device: str) -> None:
    x, router = make(5, 20, 48, kernel_device)
    wide = torch.full((5, 100), torch.nan, device=kernel_device).bfloat16()
    wide[:, 8:56] = x  # rows of a wider tensor
    together = kernel.route_rows(wide[:, 8:56], router, 3, True)
    for token in range(5):
        alone = kernel.route_rows(x[token:token + 1], router, 3, True)
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_of_them[token])


def test_whatever_the_logits_are_experts_exist(kernel_device: str) -> None:
    """Each once, so that no token takes one twice: NaN, infinite ones, equal ones."""
    x, router = make(5, 12, 16, kernel_device)
    x[0] = torch.nan
    x[1] = 0.0  # equal: the first
    x[2:], router[3:] = 1.0, 0.0
    router[5:7] = 1.0
    router[7] = torch.nan
    x[3], x[4] = torch.inf, -torch.inf
    weights, experts = kernel.route_rows(x, router, 4, True)
    assert ((experts >= 0) & (experts < 12)).all()
    assert all(len(row.unique()) == 4 for row in experts)
    assert weights[0].isnan().all()
    router[7] = 0.0
    weights, experts = kernel.route_rows(x[1:3], router, 4, True)
    assert experts[0].tolist() == [0, 1, 2, 3] and weights[0].tolist() == [0.25] * 4
    assert set(experts[1, :2].tolist()) >= {5} and weights[1].isfinite().all()


def test_what_it_does_not_take() -> None:
    x, router = make(17, 8, 16, "cpu")
    assert kernel.supports(x[:16], router)
    assert not kernel.supports(x, router)
    assert not kernel.supports(x[:4].float(), router.float())
    assert not kernel.supports(x[:4], router.repeat(100, 1))
    assert not kernel.supports(x[:4, ::2], router[:, :8].contiguous())
