"""How a checkpoint's weights are quantised, as its config.json states it.

Sources: transformers' `quantization_config` of fp8, AWQ and GPTQ checkpoints; compressed-tensors'
`config_groups`. What is not known here is refused by name, never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from longspan.errors import CheckpointError
from longspan.fields import Fields
from longspan.weight_form import BLOCK, WeightForm, WeightForms

Method = Literal["fp8", "compressed-tensors", "gptq", "awq"]
ALWAYS_PLAIN = ("lm_head", "model.embed_tokens")
IGNORED_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointQuantization:
    """What `quantization_config` says, checked."""

    method: Method
    form: WeightForm
    """What the matrices are held in: numbers and scales as they are stored."""
    ignored: tuple[str, ...] = ()
    """Modules that are not quantised; see `WeightForms`."""
    zero_offset: int = 0
    """What stored zero points lack (GPTQ version 1 stores one less)."""

    @property
    def forms(self) -> WeightForms:
        """What each matrix is held in."""
        return WeightForms(self.form, self.ignored)


def read_quantization(need: Fields) -> CheckpointQuantization | None:
    """Read config.json's quantization; None: the weights are plain. Raises `CheckpointError` for a
    method or layout that is not known."""
    key = next((key for key in ("quantization_config", "compression_config")
                if need.raw.get(key)), None)
    if key is None:
        return None
    block = need.block(key)
    method = block.raw.get("quant_method", "compressed-tensors" if "config_groups" in block.raw
                           else None)
    if method not in get_args(Method):
        raise CheckpointError(
            f"{block.source}: quant_method {method!r} is not supported, only "
            f"{', '.join(get_args(Method))}; use the bf16 checkpoint")
    ignored = _ignored(block)
    if method == "fp8":
        return CheckpointQuantization(method="fp8", form=_fp8_form(block), ignored=ignored)
    if method == "compressed-tensors":
        form = _group_form(block)
        return CheckpointQuantization(method="compressed-tensors", form=form, ignored=ignored)
    _require(block, "bits", (4,), "4 bits")
    if method == "awq":
        _require(block, "version", (None, "gemm", "GEMM"), "the gemm layout")
        return CheckpointQuantization(
            method="awq", form=WeightForm("int4", _group(block)), ignored=ignored)
    _require(block, "checkpoint_format", (None, "gptq", "gptq_v2"), "gptq or gptq_v2")
    form = WeightForm("int4", _group(block), block.boolean("desc_act"))
    offset = 0 if block.raw.get("checkpoint_format") == "gptq_v2" else 1
    return CheckpointQuantization(method="gptq", form=form, ignored=ignored, zero_offset=offset)


def _ignored(block: Fields) -> tuple[str, ...]:
    names = list(ALWAYS_PLAIN)
    for key in IGNORED_KEYS:
        found = block.raw.get(key) or []
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise block.wrong(key, "a list of names")
        names += found
    return tuple(names)


def _require(block: Fields, key: str, allowed: tuple[Any, ...], words: str) -> None:
    if block.raw.get(key) not in allowed:
        raise CheckpointError(f"{block.source}: {key} {block.raw.get(key)!r} is not supported, "
                              f"only {words}; use the bf16 checkpoint")


def _group(block: Fields) -> int:
    """Read group_size: -1 is a whole row."""
    size = block.raw.get("group_size", block.raw.get("q_group_size"))
    if not isinstance(size, int) or isinstance(size, bool) or size == 0 or size < -1:
        raise block.wrong("group_size", "-1 or a positive integer")
    return max(0, size)


def _fp8_form(block: Fields) -> WeightForm:
    _require(block, "fmt", (None, "e4m3", "float8_e4m3fn"), "e4m3")
    _require(block, "activation_scheme", (None, "dynamic", "static"), "dynamic or static")
    size = block.raw.get("weight_block_size")
    if size is None:
        return WeightForm("fp8-rows")
    _require(block, "weight_block_size", ([BLOCK, BLOCK],), f"[{BLOCK}, {BLOCK}]")
    return WeightForm("fp8-blocks")


def _group_form(block: Fields) -> WeightForm:
    """Read compressed-tensors' groups: all of them must quantise alike."""
    if block.block("sparsity_config").raw.get("format") not in (None, "dense"):
        raise CheckpointError(f"{block.source}: sparsity_config is not supported; use the bf16 "
                              "checkpoint")
    if block.block("transform_config").raw.get("config_groups"):
        raise CheckpointError(f"{block.source}: transform_config is not supported; use the bf16 "
                              "checkpoint")
    groups = block.block("config_groups")
    if not groups.raw:
        raise block.wrong("config_groups", "at least one group")
    forms = {_one_group(groups.block(name)) for name in groups.raw}
    if len(forms) > 1:
        raise CheckpointError(f"{groups.source}: groups differ in how they quantise, which is not "
                              "supported; use the bf16 checkpoint")
    return forms.pop()


def _one_group(group: Fields) -> WeightForm:
    _require(group, "targets", (["Linear"],), '["Linear"]')
    weights = group.block("weights")
    kind, bits = weights.raw.get("type"), weights.raw.get("num_bits")
    strategy = weights.raw.get("strategy")
    if (kind, bits) == ("float", 8):
        _require(weights, "strategy", ("tensor", "channel", "block"), "tensor, channel or block")
        _require(weights, "symmetric", (None, True), "true")
        if strategy != "block":
            return WeightForm("fp8-rows")
        _require(weights, "block_structure", ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"),
                 f"[{BLOCK}, {BLOCK}]")
        return WeightForm("fp8-blocks")
    if (kind, bits) == ("int", 4) and group.raw.get("input_activations") is None:
        _require(weights, "strategy", ("group", "channel"), "group or channel")
        size = _group(weights) if strategy == "group" else 0
        # "static" and "weight": the order was used to quantise, and is not stored
        return WeightForm("int4", size, weights.raw.get("actorder") in ("group", "dynamic"))
    raise CheckpointError(
        f"{weights.source}: {bits} bits of type {kind!r} are not supported, only fp8 and, with "
        "activations as they are, int4; use the bf16 checkpoint")
