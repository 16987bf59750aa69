"""Quantised weights on the GPU: all ways agree, at real sizes, in graphs, without waits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan import ops
from longspan.expert_config import ExpertConfig
from longspan.model.experts import RoutedMLP
from longspan.model.forms import make_linear
from longspan.model.layers import MLP, RMSNorm
from longspan.model.linear import Linear
from longspan.ops.moe import eager as eager_experts
from longspan.ops.quant import eager, scaled
from longspan.ops.types import Fp8Rows, Fp8Weights, Int4Weights
from longspan.weight_form import FormKind, WeightForm, WeightForms
from tests.conftest import error_ratio
from tests.gpu.syncs import no_syncs

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
KINDS: list[FormKind] = ["fp8-rows", "fp8-blocks", "int4"]
PRODUCTS = [(3_584, (3_584, 512, 512)), (18_944, (3_584,)), (3_584, (18_944, 18_944))]
"""Inputs and outputs of the 7B's merged projections."""
MAX_ROUNDED, MAX_EXACT = 0.06, 0.006
"""Error ratio where activations are rounded to e4m3 too, and where the result alone is rounded."""


def make(kind: FormKind, width: int, sizes: tuple[int, ...], *, bias: bool = True) -> Linear:
    linear = make_linear(
        WeightForm(kind, 128), width, sizes, bias=bias, dtype=BF16, device="cuda")
    linear.fill_randomly(0.02, torch.Generator("cuda").manual_seed(1))
    if linear.bias is not None:
        linear.bias.normal_()
    return linear


def exact(linear: Linear, x: Tensor) -> Tensor:
    (weights,) = [linear.stack(1)]
    assert not isinstance(weights, Tensor)
    plain = eager.dequantize(weights, torch.float32)[0]
    assert linear.bias is not None
    return x.float() @ plain.T + linear.bias.float()


@pytest.mark.parametrize("num_rows", [1, 16, 17, 50, 333, 4_096])
@pytest.mark.parametrize(("width", "sizes"), PRODUCTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind: FormKind, width: int, sizes: tuple[int, ...], num_rows: int) -> None:
    linear = make(kind, width, sizes)
    x = torch.randn(num_rows, width, device="cuda", dtype=BF16)
    with torch.inference_mode():
        linear(x)  # compiles what is compiled
        with no_syncs():
            found = linear(x)
    is_rounded = linear.group_of(x) is not None
    assert is_rounded == (num_rows > 16 and kind != "int4")
    assert error_ratio(found, exact(linear, x)) <= (MAX_ROUNDED if is_rounded else MAX_EXACT)


@pytest.mark.parametrize("group", [0, 128])
def test_activations_are_rounded_as_pytorch_does(group: int) -> None:
    x, residual = (torch.randn(70, 3_584, device="cuda", dtype=BF16) for _ in range(2))
    weight = torch.randn(3_584, device="cuda", dtype=BF16)
    normed = ops.add_rms_norm(x, residual.clone(), weight, 1e-6)[0]
    gate_up = torch.randn(70, 2 * 18_944, device="cuda", dtype=BF16)
    for found, plain in (
            (ops.rms_norm_fp8(x, residual, weight, 1e-6, group), normed),
            (ops.silu_mul_fp8(gate_up, group), ops.silu_mul(gate_up))):
        expected = eager.quantize_activations(plain, group)
        same = found.values[:70].view(torch.uint8) == expected.values.view(torch.uint8)
        assert same.float().mean() > 0.995
        torch.testing.assert_close(found.scales[:70], expected.scales, rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 100])
def test_a_fused_mlp_is_that_of_its_parts(kind: FormKind, num_rows: int) -> None:
    """Norm and SwiGLU round what the products take, and give the same as products that do."""
    mlp = MLP(3_584, 18_944, dtype=BF16, device="cuda", forms=WeightForms(WeightForm(kind, 128)))
    norm = RMSNorm(3_584, 1e-6, dtype=BF16, device="cuda")
    norm.weight.normal_()
    for linear in (mlp.gate_up_proj, mlp.down_proj):
        linear.fill_randomly(0.02, torch.Generator("cuda").manual_seed(1))
    x, residual = (torch.randn(num_rows, 3_584, device="cuda", dtype=BF16) for _ in range(2))
    with torch.inference_mode():
        rounded = norm.add(x, residual.clone(), mlp.group_of(x))
        assert isinstance(rounded, Fp8Rows) == (num_rows > 16 and kind != "int4")
        fused = mlp(rounded)
        parts = mlp.down_proj(ops.silu_mul(mlp.gate_up_proj(norm.add(x, residual.clone()))))
    assert error_ratio(fused, parts) <= 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 64, 1_024, 4_096])
def test_experts(kind: FormKind, num_tokens: int) -> None:
    config = ExpertConfig(num_experts=128, num_chosen=8, expert_size=768, is_normed=True)
    mlp = RoutedMLP(2_048, config, dtype=BF16, device="cuda",
                    forms=WeightForms(WeightForm(kind, 128)))
    mlp.gate.weight.normal_(0.0, 0.02)
    for linear in (mlp.experts.gate_up, mlp.experts.down):
        linear.fill_randomly(0.02, torch.Generator("cuda").manual_seed(1))
    x, hidden = (torch.randn(num_tokens, 2_048, device="cuda", dtype=BF16) for _ in range(2))
    with torch.inference_mode():
        weights, experts = ops.route(mlp.logits(x), 8, True)
        expected = torch.zeros(num_tokens, 2_048, device="cuda")
        eager_experts.add_routed_mlp(expected, x.float(), weights, experts.long(),
                                     mlp.experts.gate_up_proj, mlp.experts.down_proj)
        mlp.add_to(hidden.clone(), x)
        sums = torch.zeros_like(hidden)
        with no_syncs():
            mlp.add_to(sums, x)
    assert error_ratio(sums, expected) <= MAX_ROUNDED


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_few_rows_can_be_recorded(kind: FormKind) -> None:
    linear = make(kind, 3_584, (3_584, 512, 512))
    x = torch.randn(4, 3_584, device="cuda", dtype=BF16)
    with torch.inference_mode():
        expected = linear(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = linear(x)
        x.mul_(2)
        bias = linear.bias
        assert bias is not None
        graph.replay()
        assert error_ratio(out, 2 * (expected - bias) + bias) <= 0.01


def test_inputs_in_an_order_of_their_own() -> None:
    found = eager.quantize_int4(torch.randn(512, 2_048, device="cuda"), 128)
    weights = Int4Weights(
        *found[:3], torch.randperm(2_048, device="cuda").to(torch.int32))
    for num_rows in (3, 50):
        x = torch.randn(num_rows, 2_048, device="cuda", dtype=BF16)
        expected = x.float() @ weights.dense().T
        assert error_ratio(ops.int4_linear(x, weights, None), expected) <= MAX_EXACT


def test_what_pytorch_multiplies_here() -> None:
    """An H200 has all of these products; the memory plan and the figures count on it."""
    by_rows = Fp8Weights(torch.empty(512, 3_584, device="cuda", dtype=torch.float8_e4m3fn),
                         torch.empty(512, 1, device="cuda"))
    by_blocks = by_rows._replace(scales=torch.empty(4, 28, device="cuda"))
    assert (scaled.activation_group(by_rows), scaled.activation_group(by_blocks)) == (0, 128)
    stack = Fp8Weights(by_rows.values[None], by_rows.scales[None])
    assert scaled.supports_grouped(stack, stack)
