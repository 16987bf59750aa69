"""Every quantised format against transformers' model with the numbers that it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longspan.config import ModelConfig
from longspan.errors import CheckpointError
from longspan.model.linear import PlainLinear
from longspan.weight_sizes import weights_bytes
from tests.model import quantised as formats
from tests.model.test_qwen2 import MAX_DIFFERENCE, load, run_planned, token_ids

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
BLOCKS = {**FP8, "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
STATIC = {**FP8, "activation_scheme": "static"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32}
FLOAT8 = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "channel"}
TOKENS = {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True}
Case = tuple[formats.Writer, dict[str, Any]]
CASES: dict[str, Case] = {
    "fp8-blocks": (formats.fp8_blocks("weight_scale_inv"), BLOCKS),
    "fp8-tensor": (formats.fp8_tensor, STATIC),
    "groups-fp8-channel": (formats.fp8_rows, formats.groups_config(FLOAT8, TOKENS)),
    "groups-fp8-tensor": (formats.fp8_tensor, formats.groups_config(
        {**FLOAT8, "strategy": "tensor"}, {**TOKENS, "strategy": "tensor", "dynamic": False})),
    "groups-fp8-blocks": (formats.fp8_blocks("weight_scale"), formats.groups_config(
        {**FLOAT8, "strategy": "block", "block_structure": [128, 128]}, TOKENS)),
    "awq": (formats.awq(32), AWQ),
    "gptq": (formats.gptq(64, symmetric=True), GPTQ),
    "gptq-zeros": (formats.gptq(64), {**GPTQ, "sym": False}),
    "gptq-v2-zeros": (formats.gptq(64, offset=0), {**GPTQ, "checkpoint_format": "gptq_v2"}),
    "gptq-whole-rows": (formats.gptq(-1), {**GPTQ, "group_size": -1}),
    "gptq-order": (formats.gptq(64, order="same"), {**GPTQ, "desc_act": True}),
    "gptq-orders": (formats.gptq(64, order="own"), {**GPTQ, "desc_act": True}),
    "packed": (formats.packed(32, symmetric=True), formats.groups_config(INT4)),
    "packed-zeros": (formats.packed(32, symmetric=False), formats.groups_config(INT4)),
    "packed-order": (formats.packed(32, symmetric=True, order=True),
                     formats.groups_config({**INT4, "actorder": "group"})),
    "packed-channel": (formats.packed(-1, symmetric=True),
                       formats.groups_config({**INT4, "strategy": "channel"})),
}


def compare(path: Path, reference: Any, cuts: tuple[int, ...] = ()) -> None:
    ids = token_ids(70)
    with torch.no_grad():
        expected = reference(ids[None]).logits[0]
    assert expected.std() > 0.5
    logits = run_planned(load(path, cuts), ids, prompt_len=60, seed=1)
    assert (logits - expected).abs().max() <= MAX_DIFFERENCE


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_numbers_stored(tmp_path: Path, name: str) -> None:
    """Qwen2: biases, grouped heads, merged projections whose parts have scales of their own."""
    writer, config = CASES[name]
    compare(tmp_path, formats.save(tmp_path, "qwen2", writer, config))
    (model,) = load(tmp_path)
    assert not any(isinstance(layer.mlp.down_proj, PlainLinear)
                   for layer in model.decoder_layers())
    forms = model.config.quantization.forms
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert size == weights_bytes(model.config, forms, 4)


@pytest.mark.parametrize("name", ["fp8-blocks", "groups-fp8-channel", "awq", "gptq"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3-moe"])
def test_every_family(tmp_path: Path, family: str, name: str) -> None:
    """Tied embeddings, MLP biases, routed experts; in two pipeline stages."""
    writer, config = CASES[name]
    compare(tmp_path, formats.save(tmp_path, family, writer, config), (1,))


@pytest.mark.parametrize("name", ["fp8-blocks", "groups-fp8-channel", "gptq"])
@pytest.mark.parametrize("plain", [
    ("model.layers.0.mlp",), ("model.layers.1.self_attn.k_proj",)], ids=["mlp", "part"])
def test_modules_that_are_not_quantised(tmp_path: Path, name: str, plain: tuple[str, ...]) -> None:
    """A layer's MLP; or one of three projections that lie in one tensor, which is plain then."""
    writer, config = CASES[name]
    key = "ignore" if "config_groups" in config else "modules_to_not_convert"
    config = {**config, key: ["lm_head", *plain]}
    compare(tmp_path, formats.save(tmp_path, "qwen2", writer, config, plain))


def test_scales_of_eight_exponent_bits(tmp_path: Path) -> None:
    def write(matrix: Tensor) -> formats.Written:
        (parts, _) = formats.fp8_blocks("weight_scale_inv")(matrix)
        scales = parts["weight_scale_inv"].log2().ceil().exp2()
        whole = scales.repeat_interleave(128, 0)[:len(matrix)].repeat_interleave(128, 1)
        values = formats.e4m3(matrix / whole[:, :matrix.shape[1]])
        return {"weight": values, "weight_scale_inv": scales.to(torch.float8_e8m0fnu),
                }, values.float() * whole[:, :matrix.shape[1]]

    config = {**BLOCKS, "scale_fmt": "ue8m0"}
    compare(tmp_path, formats.save(tmp_path, "qwen2", write, config))


def change(path: Path, **changes: Tensor | None) -> str:
    """Change tensors of layer 1's down projection; return what loading says."""
    file, prefix = path / "model.safetensors", "model.layers.1.mlp.down_proj."
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(prefix + name, None)
        if tensor is not None:
            tensors[prefix + name] = tensor
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


NAN = torch.full((2, 3), torch.nan)


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("fp8-blocks", {"weight_scale_inv": None}, "1 of 41 tensors are missing, the first is "
                                               "model.layers.1.mlp.down_proj.weight_scale"),
    ("fp8-blocks", {"weight_scale_inv": torch.ones(3, 2)},
     "down_proj.weight_scale_inv has shape [3, 2], config.json asks for [] or [1]"),
    ("fp8-blocks", {"weight_scale_inv": NAN},
     "weight_scale_inv has numbers that are not finite or not positive; fetch the file again"),
    ("fp8-blocks", {"weight_scale_inv": -torch.ones(2, 3)}, "not finite or not positive"),
    ("fp8-blocks", {"weight": torch.zeros(256, 384)}, "down_proj.weight is stored as F32, and "
     "quantization_config says that it is fp8, a scale for each 128 x 128; name "
     "model.layers.1.mlp.down_proj in its modules_to_not_convert"),
    ("groups-fp8-channel", {"weight": torch.zeros(256, 384, dtype=torch.int8)},
     "down_proj.weight is stored as I8; only F32, F16, BF16 are supported"),
    ("awq", {"qzeros": None}, "the first is model.layers.1.mlp.down_proj.qzeros"),
    ("awq", {"scales": torch.ones(6, 256)}, "down_proj.scales has shape [6, 256], config.json "
                                            "asks for [12, 256]"),
    ("awq", {"qweight": torch.zeros(48, 256, dtype=torch.int32)},
     "down_proj.qweight has shape [48, 256], config.json asks for [384, 32]"),
    ("gptq", {"g_idx": torch.zeros(384, dtype=torch.int32)},
     "g_idx does not name 64 inputs for each of 6 groups"),
    ("gptq", {"scales": torch.full((6, 256), 1e9)}, "a scale is beyond fp16"),
    ("packed", {"weight_packed": torch.zeros(256, 48, dtype=torch.int64)},
     "down_proj.weight_packed is stored as I64; only I32 are supported"),
    ("packed", {"extra": torch.zeros(2)}, "1 unknown tensors, the first is model.layers.1.mlp."
                                          "down_proj.extra"),
])
def test_faults_are_one_line(
    tmp_path: Path, name: str, changes: dict[str, Tensor | None], message: str,
) -> None:
    formats.save(tmp_path, "qwen2", *CASES[name])
    assert message in change(tmp_path, **changes)


def test_the_method_must_be_that_of_the_tensors(tmp_path: Path) -> None:
    formats.save(tmp_path, "qwen2", CASES["awq"][0], CASES["packed"][1])
    with pytest.raises(CheckpointError, match="q_proj has qweight, which does not fit the "
                                              "quantization_config of method compressed-tensors"):
        load(tmp_path)


def test_experts_in_an_order_of_their_own_are_refused(tmp_path: Path) -> None:
    formats.save(tmp_path, "qwen3-moe", *CASES["gptq-orders"])
    with pytest.raises(CheckpointError, match="not supported for routed experts"):
        load(tmp_path)


def test_widths_that_no_group_divides_are_refused(tmp_path: Path) -> None:
    formats.save(tmp_path, "qwen2", *CASES["awq"])
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"]["group_size"] = 48
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"cannot be int4 in groups of 48"):
        load(tmp_path)


def test_a_checkpoint_without_its_configuration_is_refused(tmp_path: Path) -> None:
    formats.save(tmp_path, "qwen2", *CASES["fp8-blocks"])
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.from_dir(tmp_path).quantization is None
    with pytest.raises(CheckpointError, match="is stored as F8_E4M3; only F32, F16, BF16"):
        load(tmp_path)
