"""Quantised checkpoints written from their formats' definitions, nibble by nibble.

Nothing of the loader is used. Each writer takes a matrix and returns the tensors that its format
stores and the plain numbers that these stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Written = tuple[dict[str, Tensor], Tensor]
Writer = Callable[[Tensor], Written]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
    "llama": ("Llama", {"mlp_bias": True}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2,
                               "moe_intermediate_size": 128, "norm_topk_prob": True}),
}
"""Merged projections of 4 and 2 heads of 64; biases; tied embeddings; experts."""


def save(path: Path, family: str, writer: Writer, config: dict[str, Any],
         plain: tuple[str, ...] = ()) -> Any:
    """Save a random model quantised, and return transformers' own with what was stored.

    Args:
        plain: beginnings of module names that stay as they are.
    """
    import transformers

    name, facts = FAMILIES[family]
    torch.manual_seed(7)
    model_config = getattr(transformers, f"{name}Config")(**{
        "vocab_size": 101, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "attn_implementation": "eager", **facts})
    model = getattr(transformers, f"{name}ForCausalLM")(model_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.06)
    model.save_pretrained(path)
    file, dense = path / "model.safetensors", dict[str, Tensor]()
    stored = dict[str, Tensor]()
    for tensor_name, tensor in load_file(file).items():
        module = tensor_name.removesuffix(".weight")
        is_quantised = module.endswith("_proj") and not module.startswith(plain or ("-",))
        if not is_quantised or not tensor_name.endswith(".weight"):
            stored[tensor_name] = dense[tensor_name] = tensor
            continue
        parts, dense[tensor_name] = writer(tensor)
        stored |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(dense, file, metadata={"format": "pt"})
    reference = type(model).from_pretrained(path, dtype=torch.float32,
                                            attn_implementation="eager").eval()
    save_file(stored, file, metadata={"format": "pt"})
    facts = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**facts, "quantization_config": config}))
    return reference


def e4m3(numbers: Tensor) -> Tensor:
    return numbers.clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8_blocks(name: str) -> Writer:
    def write(matrix: Tensor) -> Written:
        rows, columns = matrix.shape
        values = torch.empty_like(matrix, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-rows // 128), -(-columns // 128))
        dense = torch.empty_like(matrix)
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                part = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
                scales[row, column] = matrix[part].abs().max() / 448
                values[part] = e4m3(matrix[part] / scales[row, column])
                dense[part] = values[part].float() * scales[row, column]
        return {"weight": values, name: scales}, dense

    return write


def fp8_rows(matrix: Tensor) -> Written:
    scales = (matrix.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    values = e4m3(matrix / scales.float())
    return {"weight": values, "weight_scale": scales}, values.float() * scales.float()


def fp8_tensor(matrix: Tensor) -> Written:
    """One scale, and the static one of the activations."""
    scale = matrix.abs().max() / 448
    values = e4m3(matrix / scale)
    return {"weight": values, "weight_scale": scale,
            "input_scale": torch.tensor(0.5)}, values.float() * scale


def int4(matrix: Tensor, group: int, index: Tensor, *, symmetric: bool) -> tuple[Tensor, ...]:
    """Numbers [N, K], scales and zeros [N, G]; index: [K], the group of each input."""
    rows, columns = matrix.shape
    groups = columns // group
    scales, zeros = torch.empty(rows, groups), torch.empty(rows, groups, dtype=torch.long)
    numbers = torch.empty(rows, columns, dtype=torch.long)
    for number in range(groups):
        part = matrix[:, index == number]
        low, high = part.amin(1), part.amax(1)
        size = torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15
        scales[:, number] = size.half().float()
        zero = torch.full((rows,), 8) if symmetric else (-low / scales[:, number]).round()
        zeros[:, number] = zero.clamp(0, 15).long()
        numbers[:, index == number] = (
            part / scales[:, number, None] + zeros[:, number, None]).round().clamp(0, 15).long()
    return numbers, scales, zeros


def dense_int4(numbers: Tensor, scales: Tensor, zeros: Tensor, index: Tensor) -> Tensor:
    return (numbers - zeros[:, index]) * scales[:, index]


def words(numbers: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Pack the last axis: nibble i of a word is number ``order[i]`` of its eight."""
    eights, packed = numbers.unflatten(-1, (-1, 8)), 0
    for nibble, number in enumerate(order):
        packed = packed + (eights[..., number] << 4 * nibble)
    assert isinstance(packed, Tensor)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def group_index(columns: int, group: int, seed: int | None) -> Tensor:
    index = torch.arange(columns) // group
    if seed is None:
        return index
    return index[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]


def gptq(group: int, *, symmetric: bool = False, offset: int = 1,
         order: str | None = None) -> Writer:
    """``order``: act order, ``same`` for all matrices of a width or ``own`` for each."""
    count = iter(range(10_000))

    def write(matrix: Tensor) -> Written:
        columns = matrix.shape[1]
        size = columns if group == -1 else group
        seed = None if order is None else 0 if order == "same" else next(count)
        index = group_index(columns, size, seed)
        numbers, scales, zeros = int4(matrix, size, index, symmetric=symmetric)
        return {"qweight": words(numbers).t(), "scales": scales.t().half(),
                "qzeros": words(((zeros - offset) % 16).t()), "g_idx": index.to(torch.int32),
                }, dense_int4(numbers, scales, zeros, index)

    return write


def awq(group: int) -> Writer:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def write(matrix: Tensor) -> Written:
        index = group_index(matrix.shape[1], group, None)
        numbers, scales, zeros = int4(matrix, group, index, symmetric=False)
        return {"qweight": words(numbers.t(), order), "qzeros": words(zeros.t(), order),
                "scales": scales.t().half()}, dense_int4(numbers, scales, zeros, index)

    return write


def packed(group: int, *, symmetric: bool, order: bool = False) -> Writer:
    """compressed-tensors' pack-quantized."""
    def write(matrix: Tensor) -> Written:
        columns = matrix.shape[1]
        size = columns if group == -1 else group
        index = group_index(columns, size, 3 if order else None)
        numbers, scales, zeros = int4(matrix, size, index, symmetric=symmetric)
        parts = {"weight_packed": words(numbers), "weight_scale": scales.half(),
                 "weight_shape": torch.tensor(matrix.shape)}
        if not symmetric:
            parts["weight_zero_point"] = words(zeros.t()).t()
        if order:
            parts["weight_g_idx"] = index.to(torch.int32)
        return parts, dense_int4(numbers, scales, zeros, index)

    return write


def groups_config(weights: dict[str, Any], activations: dict[str, Any] | None = None,
                  ) -> dict[str, Any]:
    """compressed-tensors' quantization_config."""
    return {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}}
