"""Routed experts, compiled: sizes of Qwen3-30B-A3B, no waits, CUDA graphs, and all ways agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longspan import ops
from longspan.expert_config import ExpertConfig
from longspan.model.experts import RoutedMLP
from longspan.ops.moe import eager, grouped, hopper
from longspan.ops.moe import triton as kernels
from longspan.ops.moe.hopper_product import TILE_ROWS
from longspan.ops.moe.triton_routing import group
from longspan.ops.quant import eager as eager_quant
from longspan.ops.quant import triton_rows
from longspan.ops.types import FP8_BLOCK, Fp8Rows, Fp8Weights
from tests.conftest import assert_close, error_ratio
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
    for way in (kernels, grouped, hopper, eager):
        sums = torch.zeros_like(x)
        way.add_routed_mlp(sums, x, weights, experts, *matrices)
        assert_close(sums, wanted)


HOPPER_SHAPES = [
    (1, 8, 1, 512, 512), (3, 4, 4, 512, 768), (129, 9, 2, 512, 512), (333, 60, 4, 1_024, 512),
    (2_049, 128, 8, 2_048, 768)]
"""Tokens, experts, chosen ones, model dim, width."""
MAX_E4M3_ERROR = 0.04
"""Three bits behind the first one: up to a sixteenth, a thirty-seventh in the mean."""
MAX_FP8_ERROR = 0.03
"""Beside the same roundings by PyTorch: sums of fp8 products have 14 bits."""


def make_routed(shape: tuple[int, int, int, int, int], kind: str) -> tuple[Tensor, ...]:
    """x, weights, experts, gate_up, down. ``kind``: some experts have many tokens and the last
    none; one has them all; the last third is elsewhere."""
    num_tokens, num_experts, num_chosen, dim, width = shape
    logits = torch.randn(num_tokens, num_experts, device="cuda")
    logits[:, : num_experts // 2] += 2.0
    logits[:, -1] = -30.0
    weights, experts = ops.reference.route(logits, num_chosen, True)
    x = torch.randn(num_tokens, dim, device="cuda").bfloat16()
    gate_up = (torch.randn(num_experts, 2 * width, dim, device="cuda") * dim**-0.5).bfloat16()
    down = (torch.randn(num_experts, dim, width, device="cuda") * width**-0.5).bfloat16()
    if kind == "one":
        experts = torch.full_like(experts, num_experts // 2)
    if kind == "elsewhere":
        count = num_experts - num_experts // 3
        weights = weights.masked_fill(experts >= count, 0.0)
        experts = experts.clamp(max=count)
        gate_up, down = gate_up[:count], down[:count]
    return x, weights, experts.int(), gate_up, down


def rounded_stack(matrices: Tensor) -> Fp8Weights:
    found = [eager_quant.quantize_rows(matrix.float()) for matrix in matrices]
    return Fp8Weights(*(torch.stack(part).contiguous() for part in zip(*found, strict=True)))


def dense_rows(rows: Fp8Rows) -> Tensor:
    groups = rows.values.float().unflatten(1, (rows.scales.shape[1], -1))
    return (groups * rows.scales[:, :, None]).flatten(1)


def routed_of_fp8(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Fp8Weights, down: Fp8Weights,
) -> Tensor:
    """The sums by PyTorch, fp32 but for the roundings: tokens whole, hidden rows in groups."""
    rows = dense_rows(eager_quant.quantize_activations(x, 0))
    sums = torch.zeros_like(x, dtype=torch.float32)
    for number, (up, back) in enumerate(zip(gate_up.dense(), down.dense(), strict=True)):
        for choice in range(experts.shape[1]):
            tokens = (experts[:, choice] == number).nonzero().flatten()
            if len(tokens):
                hidden = ops.reference.silu_mul(rows[tokens] @ up.t())
                rounded = dense_rows(eager_quant.quantize_activations(hidden, FP8_BLOCK))
                sums[tokens] += weights[tokens, choice, None] * (rounded @ back.t())
    return sums


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated holds NaN and the largest integers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.hopper
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("kind", ["some", "one", "elsewhere"])
@pytest.mark.parametrize("shape", HOPPER_SHAPES, ids=str)
def test_hopper_products(
    shape: tuple[int, int, int, int, int], kind: str, dtype: str,
) -> None:
    """Whatever stands in memory, and twice the same."""
    x, weights, experts, gate_up, down = make_routed(shape, kind)
    up: Tensor | Fp8Weights = gate_up
    back: Tensor | Fp8Weights = down
    if dtype == "fp8":
        up, back = rounded_stack(gate_up), rounded_stack(down)
        wanted = routed_of_fp8(x, weights, experts, up, back)
    else:
        wanted = torch.zeros(x.shape, device="cuda")
        eager.add_routed_mlp(wanted, x.float(), weights, experts.long(), gate_up.float(),
                             down.float())
    assert hopper.supports(x, up, back)
    sums, again = torch.zeros_like(x), torch.zeros_like(x)
    with poisoned():
        hopper.add_routed_mlp(sums, x, weights, experts, up, back)
        with no_syncs():
            hopper.add_routed_mlp(again, x, weights, experts, up, back)
    if dtype == "fp8":
        assert error_ratio(sums, wanted) <= MAX_FP8_ERROR
    else:
        assert_close(sums, wanted)
    assert torch.equal(sums, again)


@pytest.mark.hopper
def test_hopper_products_store_their_own_rows() -> None:
    """Rows of tiles that are not there stay what they were; a wider tensor's rows are read."""
    x, weights, experts, gate_up, down = make_routed(HOPPER_SHAPES[3], "elsewhere")
    wide = torch.full((len(x), 2 * x.shape[1]), torch.nan, device="cuda", dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    with poisoned():
        tiles = hopper.list_tiles(group(experts, len(gate_up)), experts.shape[1], x)
        hidden = hopper.expert_up(wide[:, : x.shape[1]], tiles, gate_up)
        routed = hopper.expert_down(hidden, tiles, down)
    end = int(tiles.experts[-1]) * TILE_ROWS
    assert isinstance(hidden, Tensor) and 0 < end < len(hidden)
    for rows in (hidden, routed):
        assert rows[:end].isfinite().all() and rows[end:].isnan().all()
    places = tiles.places[(experts < len(gate_up)).flatten()]
    assert len(places.unique()) == len(places) and places.max() < end


@pytest.mark.hopper
@pytest.mark.parametrize("shape", HOPPER_SHAPES[2:], ids=str)
def test_hopper_rounds_what_experts_make(shape: tuple[int, int, int, int, int]) -> None:
    """Each row in groups of 128, a row of zeros among them; rows of very different size."""
    x, _, experts, gate_up, _ = make_routed(shape, "some")
    x *= torch.logspace(-12, 12, len(x), base=2.0, device="cuda").bfloat16()[:, None]
    x[0] = 0.0
    up, rows = rounded_stack(gate_up), triton_rows.quantize(x, 0)
    tiles = hopper.list_tiles(group(experts, len(gate_up)), experts.shape[1], rows)
    with poisoned():
        hidden = hopper.expert_up(rows, tiles, up)
    assert isinstance(hidden, Fp8Rows)
    found, tokens = dense_rows(hidden), dense_rows(rows)[tiles.tokens.long()[tiles.places.long()]]
    found, flat = found[tiles.places.long()], experts.flatten()
    for number, matrix in enumerate(up.dense()):
        is_own = flat == number
        if is_own.any():
            wanted = ops.reference.silu_mul(tokens[is_own] @ matrix.float().t())
            rounded = eager_quant.quantize_activations(wanted, FP8_BLOCK)
            scales = hidden.scales[tiles.places.long()[is_own]]
            torch.testing.assert_close(scales, rounded.scales, rtol=0.05, atol=0.0)
            part = wanted.abs().amax(1).clamp_min(1e-30)[:, None]  # each row counts
            assert error_ratio(found[is_own] / part, wanted / part) <= MAX_E4M3_ERROR


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
