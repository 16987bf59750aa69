"""Experts stored in one tensor a layer are recognised by shape; what is not known is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longspan.errors import CheckpointError
from longspan.model.experts import RoutedMLP
from longspan.model.linear import PlainLinear
from tests.model.test_qwen2 import Driver, load, save_model, token_ids

PREFIX = "model.layers.{}.mlp.experts."
NUM_EXPERTS, NUM_LAYERS = 6, 3


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_model(tmp_path, "qwen3-moe", 4, 2, tied=False)
    return tmp_path


def fuse(path: Path, names: tuple[str, str], turned: tuple[bool, bool]) -> None:
    """Store each layer's experts together, with the last two axes exchanged where ``turned``."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    for layer in range(NUM_LAYERS):
        prefix = PREFIX.format(layer)
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}{expert}.{part}_proj.weight")
                         for expert in range(NUM_EXPERTS)]) for part in ("gate", "up", "down"))
        for name, whole, is_turned in zip(
                names, (torch.cat((gate, up), 1), down), turned, strict=True):
            tensors[prefix + name] = (whole.transpose(1, 2) if is_turned else whole).contiguous()
    save_file(tensors, file)


def logits(path: Path) -> Tensor:
    stages, ids = load(path), token_ids(40)
    return Driver(stages, 40).step(ids)


@pytest.mark.parametrize("names", [
    ("gate_up_proj", "down_proj"), ("w13.weight", "w2.weight"), ("b", "a")], ids=str)
@pytest.mark.parametrize("turned", [
    (False, False), (True, True), (True, False), (False, True)], ids=str)
def test_any_name_and_order_of_axes(
    checkpoint: Path, names: tuple[str, str], turned: tuple[bool, bool],
) -> None:
    expected = logits(checkpoint)
    fuse(checkpoint, names, turned)
    assert torch.equal(logits(checkpoint), expected)


def test_a_stage_takes_its_own_layers(checkpoint: Path) -> None:
    fuse(checkpoint, ("gate_up_proj", "down_proj"), (False, False))
    whole, *stages = load(checkpoint) + load(checkpoint, (1,))
    own = [layer.mlp for stage in stages for layer in stage.decoder_layers()]
    for one, layer in zip(own, whole.decoder_layers(), strict=True):
        assert isinstance(one, RoutedMLP) and isinstance(layer.mlp, RoutedMLP)
        one_part, part = one.experts.gate_up, layer.mlp.experts.gate_up
        assert isinstance(one_part, PlainLinear) and isinstance(part, PlainLinear)
        assert torch.equal(one_part.weight, part.weight)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_experts_are_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors[PREFIX.format(1) + "4.up_proj.weight"]
    save_file(tensors, file)
    assert "1 of 84 tensors are missing, the first is model.layers.1.mlp.experts.4.up_proj" in \
        refusal(checkpoint)


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("count", [4, 8])
def test_a_wrong_number_of_experts(checkpoint: Path, count: int, is_fused: bool) -> None:
    if is_fused:
        fuse(checkpoint, ("gate_up_proj", "down_proj"), (False, False))
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    config["num_local_experts"] = count
    file.write_text(json.dumps(config))
    message = refusal(checkpoint)
    if is_fused:
        assert f"gate_up_proj [6, 48, 64], which is not known; needed are [{count}, 48" in message
    elif count == 4:
        assert "experts.4.down_proj.weight is of expert 4, and config.json says num_experts 4 " \
            "(0 to 3)" in message
    else:
        assert "tensors are missing, the first is model.layers.0.mlp.experts.6.gate_proj" in message


def test_a_third_tensor_is_not_known(checkpoint: Path) -> None:
    fuse(checkpoint, ("gate_up_proj", "down_proj"), (False, False))
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors[PREFIX.format(2) + "gate_up_proj_bias"] = torch.zeros(6, 48)
    save_file(tensors, file)
    assert "model.layers.2.mlp.experts are stored together as down_proj" in refusal(checkpoint)


def test_experts_where_config_json_has_none(checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    config["mlp_only_layers"] = [1]
    file.write_text(json.dumps(config))
    assert "tensors are missing, the first is model.layers.1.mlp.gate_proj" in refusal(checkpoint)
    fuse(checkpoint, ("gate_up_proj", "down_proj"), (False, False))
    assert "model.layers.1.mlp.gate_proj" in refusal(checkpoint)
