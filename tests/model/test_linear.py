"""Products with weights, whatever form these are held in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.config import AttentionMode
from longspan.engine.front.llm import LLM
from longspan.engine.request import SamplingParams
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.model.forms import LINEARS, make_embedding, make_linear
from longspan.model.int4_cpu import Int4CpuLinear
from longspan.model.int8 import Int8Linear, Int8Table
from longspan.model.linear import Linear, PlainLinear
from longspan.model.qwen2 import CausalLM
from longspan.weight_form import PLAIN, FormKind, WeightForm, WeightForms, is_named

SIZES, WIDTH = (256, 128, 128), 160
ERRORS: dict[FormKind, float] = {
    "plain": 1e-6, "fp8-rows": 0.04, "fp8-blocks": 0.04, "int4": 0.15, "int4-cpu": 0.1,
    "int8-rows": 0.02}
"""Mean error of a stored matrix over its mean size."""


def make(kind: FormKind, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> Linear:
    return make_linear(WeightForm(kind), WIDTH, SIZES, bias=bias, dtype=dtype, device="cpu")


def fill(linear: Linear) -> dict[str, Tensor]:
    tensors = {name: torch.randn(target.shape) * (1 + number)
               for number, (name, target) in enumerate(linear.targets("q", "k", "v").items())}
    for name, target in linear.targets("q", "k", "v").items():
        target.fill(tensors[name])
    return tensors


@pytest.mark.parametrize("kind", LINEARS)
def test_a_merged_product_is_that_of_its_parts(kind: FormKind) -> None:
    """Parts of different sizes and scales; whole, added in place, and some outputs only."""
    linear, x = make(kind), torch.randn(5, WIDTH)
    tensors = fill(linear)
    expected = torch.cat([x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
                          for name in ("q", "k", "v")], 1)
    found = linear(x)
    for part, exact in zip(found.split(SIZES, 1), expected.split(SIZES, 1), strict=True):
        assert (part - exact).abs().mean() <= ERRORS[kind] * exact.abs().mean()
    sums = torch.randn(5, sum(SIZES))
    added = sums.clone()
    linear.add_to(added, x)
    rounding = 0.01 if kind == "int4-cpu" else 1e-5  # products come in bf16
    torch.testing.assert_close(added, sums + found, rtol=rounding, atol=10 * rounding)
    torch.testing.assert_close(linear.part(x, slice(256, None)), found[:, 256:])


@pytest.mark.parametrize("kind", LINEARS)
def test_a_stack_of_equal_matrices_is_the_same_weights(kind: FormKind) -> None:
    linear = make_linear(WeightForm(kind), WIDTH, (16, 16), dtype=torch.float32, device="cpu")
    for target in linear.targets("a", "b").values():
        target.fill(torch.randn(target.shape))
    stack, x = linear.stack(2), torch.randn(3, WIDTH)
    plain = stack if isinstance(stack, Tensor) else stack.dense()
    assert tuple(stack.shape) == (2, 16, WIDTH)
    rtol, atol = (1e-2, 0.2) if kind == "int4-cpu" else (1e-3, 2e-3)  # activations in bf16
    torch.testing.assert_close(
        linear(x), (x @ plain.transpose(1, 2)).transpose(0, 1).flatten(1), rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", LINEARS)
def test_random_weights_have_the_size_that_is_asked_for(kind: FormKind) -> None:
    linear = make(kind, torch.bfloat16, bias=False)
    linear.fill_randomly(0.02, torch.Generator().manual_seed(1))
    columns = linear(torch.eye(WIDTH, dtype=torch.bfloat16))
    assert 0.018 < float(columns.float().std()) < 0.022


@pytest.mark.parametrize("kind", ["fp8-rows", "int8-rows"])
def test_rows_of_zeros_stay_zeros_and_large_numbers_finite(kind: FormKind) -> None:
    linear = make(kind, bias=False)
    matrix = torch.zeros(24, WIDTH)
    matrix[1] = 3e38
    matrix[2, 0] = 1e-20
    linear.fill(slice(0, 24), matrix)
    linear.fill(slice(24, sum(SIZES)), torch.zeros(sum(SIZES) - 24, WIDTH))
    found = linear(torch.eye(WIDTH))[:, :24].T
    assert torch.equal(found[0], torch.zeros(WIDTH)) and found[:3].isfinite().all()
    torch.testing.assert_close(found[1], matrix[1])


def test_modules_stay_plain_by_name_end_beginning_or_pattern() -> None:
    names = ("lm_head", "model.layers.0", "down_proj", r"re:.*\.7\.mlp\..*")
    named = ("model.layers.0.mlp.up_proj", "model.layers.3.mlp.down_proj",
             "model.layers.7.mlp.up_proj", "lm_head")
    other = ("model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj",
             "model.layers.3.mlp.shutdown_proj", "model.layers.7.self_attn.o_proj")
    assert all(is_named(name, names) for name in named)
    assert not any(is_named(name, names) for name in other)


def test_matrices_in_one_tensor_are_plain_if_one_of_them_is() -> None:
    forms = WeightForms(WeightForm("fp8-rows"), ("k_proj",)).within("model").within("self_attn")
    assert forms.of("q_proj", "k_proj", "v_proj") == PLAIN
    assert forms.of("o_proj") == WeightForm("fp8-rows")


def held_bytes(model: CausalLM) -> int:
    """Bytes of a model's weights, packed ones included."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, Int8Linear):
            copies = int(module._packed is not None) + int(module._values is not None)
            total += copies * sum(module.sizes) * (module.in_features + 4)
        if isinstance(module, Int4CpuLinear):
            total += sum(part.numel() * part.element_size() for part in module.packed)
    return total


def test_int8_weights_are_packed_when_all_have_come_and_can_be_filled_again() -> None:
    linear = make_linear(WeightForm("int8-rows"), WIDTH, (24, 8, 16), dtype=torch.float32,
                         device="cpu")
    assert isinstance(linear, Int8Linear)
    linear.fill(slice(24, 32), torch.ones(8, WIDTH))
    linear.fill(slice(0, 24), torch.ones(24, WIDTH))
    with pytest.raises(AssertionError, match="filled before"):
        linear(torch.ones(1, WIDTH))
    linear.fill(slice(32, 48), torch.ones(16, WIDTH))
    assert linear._values is None, "the packed matrix is the only one"
    linear.fill(slice(24, 32), 2 * torch.ones(8, WIDTH))
    torch.testing.assert_close(linear.dense().mean(1), torch.ones(48).index_fill_(
        0, torch.arange(24, 32), 2.0))


@pytest.mark.parametrize("is_head", [True, False])
def test_an_int8_embedding_gives_rows_and_only_a_tied_one_products(is_head: bool) -> None:
    table = make_embedding(WeightForm("int8-rows"), WIDTH, 30, is_head=is_head,
                           dtype=torch.float32, device="cpu")
    matrix = torch.randn(30, WIDTH) * torch.arange(1, 31)[:, None]
    (target,) = table.targets("embed").values()
    target.fill(matrix)
    assert isinstance(table, Int8Table) and (table._packed is not None) == is_head
    ids = torch.tensor([29, 0, 7, 7])
    found, step = table.rows(ids), matrix[ids].abs().amax(1, keepdim=True) / 127
    assert ((found - matrix[ids]).abs() <= 0.501 * step).all()
    if is_head:
        exact = torch.eye(WIDTH) @ table.dense().T
        torch.testing.assert_close(table(torch.eye(WIDTH)), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["fp8", "int4", "int8"])
def test_a_model_is_quantised_while_it_is_loaded(kind: str) -> None:
    """The bundled model: less memory, as planned, and nearly the same probabilities."""
    prompt, sizes, scores = "The number of the house is 7. " * 9, [], []
    for quantization in (None, kind):
        with LLM("nano", device="cpu", num_threads=1, max_model_len=512,
                 quantization=quantization) as llm:
            (output,) = llm.generate(prompt, SamplingParams(max_tokens=0, prompt_logprobs=0))
            model = llm._runner._stages[0].model
            sizes.append(held_bytes(model))
            engine = ResolvedEngine.resolve(llm.config)
            assert sizes[-1] == engine.memory.weights_bytes
            linear = model.decoder_layers()[0].mlp.down_proj
            assert isinstance(linear, PlainLinear) == (quantization is None)
            assert output.prompt_logprobs is not None
            scores.append(torch.as_tensor(output.prompt_logprobs[1:]))
    assert sizes[1] < 0.45 * sizes[0]
    assert 0 < (scores[1] - scores[0]).abs().mean() < (0.15 if kind == "int4" else 0.05)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_keys_and_values_in_bf16_beside_fp32(attention: AttentionMode) -> None:
    """The bundled model: half of the memory, and nearly the same probabilities, sparsely too."""
    prompt, sizes, scores = "The number of the house is 7. " * 90, [], []
    for kv_dtype in ("float32", "bfloat16"):
        with LLM("nano", device="cpu", num_threads=1, max_model_len=1_024, attention=attention,
                 kv_dtype=kv_dtype) as llm:
            (output,) = llm.generate(prompt, SamplingParams(max_tokens=2, prompt_logprobs=0))
            cache = llm._runner.caches[0]
            sizes.append(cache.k.element_size())
            assert cache.k_mean is None or cache.k_mean.dtype == torch.float32
            assert output.prompt_logprobs is not None
            scores.append(torch.as_tensor(output.prompt_logprobs[1:]))
    assert sizes == [4, 2]
    assert 0 < (scores[1] - scores[0]).abs().mean() < 0.01
