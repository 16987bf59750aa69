"""Decisions that follow from configuration and checkpoint, as pure functions. No torch."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from longspan.config import (
    AttentionMode,
    DcaConfig,
    EngineConfig,
    ModelConfig,
    PositionMode,
    Quantization,
)
from longspan.dca_config import DCA_REACH, derive_dca
from longspan.errors import LongspanError
from longspan.units import DTYPE_BYTES, default_dtype
from longspan.weight_form import PLAIN, PLAIN_FORMS, WeightForm, WeightForms

STEP_BUDGET_S = {"cpu": 1.0, "cuda": 0.1}
QUANTIZED_FORMS: dict[Quantization, WeightForm] = {
    "none": PLAIN, "fp8": WeightForm("fp8-rows"), "int4": WeightForm("int4", 128),
    "int8": WeightForm("int8-rows")}
"""What `EngineConfig.quantization` makes of a checkpoint's plain matrices."""
CPU_INT4 = WeightForm("int4-cpu", 32)
"""What int4 is on CPUs: groups of 32 cost decoding nothing there."""
INT8_BYTES = 1 << 30
"""On CPUs models that take more in fp32 are quantised to int8 where nobody says: they are read from
memory for every token. Smaller ones would gain little."""
DEVICE = re.compile(r"cpu|cuda(:\d+)?")


def model_name(model: str) -> str:
    """Name a model for people; one that is a directory by the last part of its path."""
    path = os.path.expanduser(model)
    return Path(path).resolve().name if model and os.path.isdir(path) else model


def resolve_config(config: EngineConfig, *, has_cuda: bool) -> EngineConfig:
    """Return a new configuration with device, dtype and step budget decided."""
    device = resolve_device(config.device, has_cuda=has_cuda)
    dtype = config.dtype or default_dtype(device)
    if dtype not in DTYPE_BYTES:
        raise LongspanError(f"dtype {dtype!r} is not supported; use {' or '.join(DTYPE_BYTES)}")
    return replace(config, device=device, dtype=dtype,
                   step_budget_s=config.step_budget_s or STEP_BUDGET_S[device.split(":")[0]])


def resolve_device(device: str | None, *, has_cuda: bool) -> str:
    """Choose the device; None: a GPU if there is one. Raises `LongspanError` for an unknown one."""
    device = device or ("cuda" if has_cuda else "cpu")
    if not DEVICE.fullmatch(device):
        raise LongspanError(f"device {device!r} is not supported; use cpu or cuda (cuda:1 for the "
                            "second GPU)")
    if device.startswith("cuda") and not has_cuda:
        raise LongspanError("device cuda was asked for and torch finds no CUDA GPU; use cpu")
    return device


def resolve_quantization(
    asked: EngineConfig, model: ModelConfig, *, device: str, has_int8: bool,
) -> Quantization | None:
    """Choose what weights are quantised to. On CPUs large models are int8, unless a type is asked
    for, or the machine has no product for it.

    Args:
        has_int8: the machine has it, and that of int4.

    Raises `LongspanError` where int8 is asked for and cannot be, or int4 on such a CPU.
    """
    lacks = ""
    if device != "cpu":
        lacks = f"is for CPUs, and the device is {device}; use fp8, or leave it out"
    elif not has_int8:
        lacks = "needs an x86 CPU with AVX2; leave it out"
    elif model.experts is not None:
        lacks = "is not there for routed experts; leave it out"
    if asked.quantization == "int8" and lacks:
        raise LongspanError(f"quantization int8 {lacks}")
    if asked.quantization == "int4" and device == "cpu" and not has_int8:
        raise LongspanError(f"quantization int4 on a CPU {lacks}")
    is_plain = model.quantization is None and asked.dtype is None
    if asked.quantization is not None or not is_plain or lacks:
        return asked.quantization
    is_large = model.num_parameters * DTYPE_BYTES[default_dtype(device)] > INT8_BYTES
    return "int8" if is_large else None


def resolve_kv_dtype(config: EngineConfig) -> str | None:
    """Choose the type that keys and values are kept in; None: ``dtype``. On CPUs they are bfloat16
    where weights are rounded more than that: attention widens them as it reads.

    Args:
        config: resolved, quantization too.

    Raises `LongspanError` for a type that the device's kernels do not read.
    """
    asked = config.kv_dtype
    is_rounded = config.device == "cpu" and config.quantization in ("int4", "int8")
    if asked is None and is_rounded and config.context_parallel == 1:  # whose ranks divide others
        asked = "bfloat16"
    if asked is None or asked == config.dtype:
        return None
    if asked != "int8" and (config.device != "cpu" or config.dtype != "float32"):
        raise LongspanError(
            f"kv_dtype {asked} beside dtype {config.dtype} on {config.device}: keys and values are "
            f"{config.dtype} or int8 there; leave it out")
    return asked


def resolve_forms(config: EngineConfig, model: ModelConfig) -> WeightForms:
    """Return what the matrices of the layers are held in. Raises `LongspanError` for a checkpoint
    that is quantised otherwise than asked for."""
    asked, stored = config.quantization, model.quantization
    if stored is None:
        if asked is None:
            return PLAIN_FORMS
        is_cpu = asked == "int4" and config.device == "cpu" and model.experts is None
        return WeightForms(CPU_INT4 if is_cpu else QUANTIZED_FORMS[asked])
    if asked not in (None, "none") and not stored.form.kind.startswith(asked):
        raise LongspanError(
            f"quantization {asked!r}: the checkpoint's weights are quantised already "
            f"({stored.method}, {stored.form.label}); leave quantization out")
    return stored.forms


def resolve_positions(mode: PositionMode, model: ModelConfig) -> DcaConfig | None:
    """Choose the DCA settings in effect; None is plain RoPE. Raises `LongspanError` without any.

    A checkpoint without DCA gets it where it is asked for by name (`derive_dca`).
    """
    if mode == "rope" or (mode == "auto" and model.dca is None):
        return None
    dca = model.dca or derive_dca(model.max_position_embeddings)
    if mode == "dca":
        return replace(dca, original_max_position_embeddings=0)
    if mode == "dca+yarn" and not dca.original_max_position_embeddings:
        raise LongspanError(
            "positions 'dca+yarn' needs original_max_position_embeddings in the checkpoint's "
            "dual_chunk_attention_config; add it or use positions 'dca'")
    scaling = model.rope_scaling
    if mode == "dca+yarn" and scaling is not None and scaling.kind == "yarn":
        raise LongspanError("positions 'dca+yarn': the checkpoint's own rope scaling has the YaRN "
                            "temperature in it; use positions 'dca'")
    return dca


def extend_window(mode: PositionMode, model: ModelConfig) -> ModelConfig:
    """Return what a checkpoint without DCA claims when it is run with it: `DCA_REACH` windows.

    Prompts of up to one DCA chunk are as without DCA, to the bit: sparse prefill begins behind.
    """
    dca = resolve_positions(mode, model)
    if model.dca is not None or dca is None:
        return model
    return replace(
        model, dca=dca, max_position_embeddings=DCA_REACH * model.max_position_embeddings,
        sparse_threshold=max(model.sparse_threshold, dca.dca_chunk_len))


def check_tiles(dca: DcaConfig | None, *, block_size: int, max_model_len: int) -> None:
    """Raise `LongspanError` unless each sparse tile, a KV block, lies in one DCA chunk."""
    if dca is None or dca.dca_chunk_len % block_size == 0 or max_model_len <= dca.dca_chunk_len:
        return
    raise LongspanError(
        f"sparse prefill beyond {dca.dca_chunk_len} tokens (chunk_size - local_size of the "
        f"checkpoint's dual_chunk_attention_config) needs a block_size that divides them, not "
        f"{block_size}; use attention dense, or a max_model_len of at most {dca.dca_chunk_len}")


def check_window(model: ModelConfig, dca: DcaConfig | None, *, max_model_len: int) -> None:
    """Raise `LongspanError` where positions beyond the window would rotate keys by the request's
    length."""
    scaling, window = model.rope_scaling, model.max_position_embeddings
    if dca is None and scaling and scaling.kind == "dynamic" and max_model_len > window:
        raise LongspanError(
            f"max_model_len {max_model_len} is beyond the {window} tokens of the checkpoint, whose "
            "rope scaling of type 'dynamic' turns cached keys anew as a request grows; use "
            "positions 'dca' for such lengths")


def may_be_sparse(mode: AttentionMode, *, has_plan: bool, has_dca: bool) -> bool:
    """Return whether a request may prefill sparsely: the caches keep block means then."""
    return mode == "sparse" or (mode == "auto" and (has_plan or has_dca))


def resolve_attention(
    mode: AttentionMode, prompt_len: int, *, threshold: int, has_plan: bool, has_dca: bool,
) -> bool:
    """Return whether a prompt of this length prefills sparsely.

    ``auto``: prompts above the checkpoint's threshold, if the checkpoint was meant for long
    contexts, that is, it has budgets or DCA.
    """
    possible = may_be_sparse(mode, has_plan=has_plan, has_dca=has_dca)
    return possible and (mode == "sparse" or prompt_len > threshold)
