"""GGUF files: what llama.cpp's format says of a model, in the terms of a Hugging Face checkpoint.

Nothing is guessed: a key, a tensor or a kind of RoPE that has no counterpart here is refused by
its name. Tensors stay on the disk until their rows are asked for.
Sources: llama.cpp `convert_hf_to_gguf.py` (keys, names, order of rotary rows); gguf-py (format).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor

from longspan.attention.rope import build_rotary, inverse_frequencies
from longspan.config import ModelConfig
from longspan.errors import CheckpointError
from longspan.fields import Fields
from longspan.model.qwen2 import EMBEDDING, HEAD, NORM, CausalLM
from longspan.rope_config import RopeScaling

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
"""By ``general.architecture``; Mistral's files call themselves llama."""
TOP_NAMES = {EMBEDDING: "token_embd.weight", NORM: "output_norm.weight", HEAD: "output.weight"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down"}
ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3's divisors of the rotary frequencies, a tensor instead of a key."""
KNOWN_KEYS = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.freq_base",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.finetuned"})
PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
UNKNOWN_TYPE = re.compile(r"(\d+)\)? is not a valid GGMLQuantizationType")
"""In gguf-py's error."""
FULL_PRECISION = ("F32", "F16", "BF16")
MAX_COPY_ERROR = 0.1
"""Mean difference of two quantisations of one matrix, over its mean size: 4 bits and more stay
below; matrices that were trained apart differ by more than their size."""
PIECE_ELEMENTS = 2**22
"""Numbers that are dequantised at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufModel:
    """All parts of a model's files, opened."""

    path: Path
    """The first part."""
    fields: dict[str, Any]
    """Metadata of the first part."""
    tensors: dict[str, Any]
    """gguf-py's `ReaderTensor` by GGUF name."""

    def quantisation(self) -> dict[str, int]:
        """How many tensors there are of each type."""
        return dict(Counter(tensor.tensor_type.name for tensor in self.tensors.values()))


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTensor:
    """One tensor of the checkpoint to be written, and where it comes from."""

    name: str
    shape: tuple[int, ...]
    source: Any
    order: Any = None
    """Rows of the source in the order of the checkpoint; None: as they are."""

    def pieces(self) -> Iterator[Tensor]:
        """Yield the numbers in bf16, some rows at a time. Raises `CheckpointError` for NaN."""
        data = self.source.data
        step = max(1, PIECE_ELEMENTS // self.shape[-1]) if len(self.shape) > 1 else len(data)
        for start in range(0, len(data), step):
            rows = slice(start, start + step)
            values = _floats(data[rows if self.order is None else self.order[rows]], self.source)
            if not values.isfinite().all():
                raise CheckpointError(f"{self.source.name} holds NaN or infinity; fetch the file "
                                      "again, or another one")
            yield values.to(torch.bfloat16)


def read_gguf(path: Path) -> GgufModel:
    """Open a file, and with one part of a split model all of them.

    Raises `CheckpointError` for what is no GGUF file, truncated or incomplete.
    """
    paths = _part_paths(path)
    readers = [_open(part) for part in paths]
    fields = {key: field.contents() for key, field in readers[0].fields.items()}
    num_parts = fields.get("split.count", len(paths)) or 1
    if num_parts != len(paths):
        raise CheckpointError(f"{path}: part of a model in {num_parts} files; give them their "
                              "names back, which end in -00001-of-0000N.gguf")
    tensors: dict[str, Any] = {}
    for part, reader in zip(paths, readers, strict=True):
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise CheckpointError(f"{part}: {tensor.name} is in another part too; these parts "
                                      "do not belong together, fetch them again")
            tensors[tensor.name] = tensor
    stated = fields.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise CheckpointError(f"{paths[0]}: {len(tensors)} tensors in {len(paths)} parts instead "
                              f"of {stated}; these parts do not belong together, fetch them again")
    return GgufModel(path=paths[0], fields=fields, tensors=tensors)


def hf_config(gguf: GgufModel, *, is_tied: bool) -> dict[str, Any]:
    """Return what config.json says of the model. Raises `CheckpointError` naming what is missing or
    has no counterpart."""
    family = gguf.fields.get("general.architecture")
    if family not in ARCHITECTURES:
        raise CheckpointError(f"{gguf.path}: architecture {family!r} is not supported; supported: "
                              f"{', '.join(ARCHITECTURES)}")
    prefix = f"{family}."
    need = Fields({key.removeprefix(prefix): value for key, value in gguf.fields.items()
                   if key.startswith(prefix)}, f"{gguf.path}: {family}")
    for key, value in need.raw.items():
        if key not in KNOWN_KEYS and value not in (0, False, None):
            raise CheckpointError(f"{need.source}.{key} is {value!r}, which is not supported")
    hidden_size, num_heads = need.integer("embedding_length"), need.integer("attention.head_count")
    head_dim = need.integer("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if need.integer(key, head_dim) != head_dim:
            raise need.wrong(key, f"the head dim {head_dim}")
    rope = _rope(need, gguf, head_dim)
    return {
        "architectures": [ARCHITECTURES[family]], "model_type": family, "hidden_act": "silu",
        "hidden_size": hidden_size, "intermediate_size": need.integer("feed_forward_length"),
        "num_hidden_layers": need.integer("block_count"), "num_attention_heads": num_heads,
        "num_key_value_heads": need.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim, "vocab_size": _vocab_size(gguf),
        # fp32 in the file: 1e-6 reads as 9.99999997e-7
        "rms_norm_eps": float(f"{need.number('attention.layer_norm_rms_epsilon'):.6g}"),
        "max_position_embeddings": need.integer("context_length"),
        "rope_theta": rope["rope_theta"], "rope_parameters": rope,
        **({"rope_scaling": rope} if rope["rope_type"] != "default" else {}),
        **(_biases(gguf) if family == "llama" else {}),
        "tie_word_embeddings": is_tied, "use_cache": True, "torch_dtype": "bfloat16"}


def is_tied(gguf: GgufModel) -> bool:
    """Whether the head is the embedding: absent, or the same matrix, perhaps in more bits."""
    head, embedding = (gguf.tensors.get(TOP_NAMES[name]) for name in (HEAD, EMBEDDING))
    if head is None or embedding is None:
        return True
    if head.shape.tolist() != embedding.shape.tolist():
        return False
    is_exact = all(t.tensor_type.name in FULL_PRECISION for t in (head, embedding))
    limit = 0.0 if is_exact else MAX_COPY_ERROR
    step = max(1, PIECE_ELEMENTS // int(head.shape[0]))
    for start in range(0, len(head.data), step):
        one, other = (_floats(t.data[start : start + step], t).bfloat16().float()
                      for t in (head, embedding))
        if (one - other).abs().mean() > limit * other.abs().mean():
            return False
    return True


def plan_tensors(gguf: GgufModel, config: ModelConfig) -> list[PlannedTensor]:
    """Every weight of the model with its source, in the model's order.

    Raises `CheckpointError` for missing, unknown, wrongly shaped tensors and unknown types.
    """
    shapes = _shapes(config)
    sources = {name: gguf_name(name) for name in shapes}
    absent = [source for source in sources.values() if source not in gguf.tensors]
    if absent:
        raise CheckpointError(f"{gguf.path}: {len(absent)} of {len(sources)} tensors are missing, "
                              f"the first is {absent[0]}; fetch the file again")
    known = {*sources.values(), ROPE_FACTORS, TOP_NAMES[HEAD]}
    unknown = [name for name in gguf.tensors if name not in known]
    if unknown:
        raise CheckpointError(f"{gguf.path}: {len(unknown)} unknown tensors, the first is "
                              f"{unknown[0]}; this is not a plain {config.architecture}")
    if config.tie_word_embeddings:
        sources[EMBEDDING] = _finer(gguf, sources[EMBEDDING], TOP_NAMES[HEAD])
    _check_types(gguf, set(sources.values()))
    return [_planned(gguf, config, name, gguf.tensors[sources[name]], shape)
            for name, shape in shapes.items()]


def gguf_name(name: str) -> str:
    """Return the GGUF name of a tensor of a Hugging Face checkpoint."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, _, idx, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"blk.{idx}.{LAYER_NAMES[part]}.{kind}"


def _part_paths(path: Path) -> list[Path]:
    found = PART_NAME.fullmatch(path.name)
    if found is None:
        return [path]
    base, _, count = found.groups()
    paths = [path.with_name(f"{base}-{idx:05}-of-{count}.gguf") for idx in range(1, int(count) + 1)]
    absent = [part for part in paths if not part.is_file()]
    if absent or not paths:
        raise CheckpointError(f"{path}: {len(absent)} of {int(count)} parts are missing, the first "
                              f"is {absent[0].name if absent else path.name}; fetch them")
    return paths


def _open(path: Path) -> Any:
    try:
        with path.open("rb") as stream:
            magic = stream.read(8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if magic == b"version ":
        raise CheckpointError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull`")
    if magic[:4] != b"GGUF":
        raise CheckpointError(f"{path}: not a GGUF file, it begins with {magic[:4]!r}")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        unknown = UNKNOWN_TYPE.search(str(error))
        if unknown:
            raise CheckpointError(f"{path}: holds tensors of type {unknown[1]}, which is not "
                                  "known; take a file of another quantisation") from None
        raise CheckpointError(
            f"{path}: truncated or damaged ({error}); fetch the file again") from None
    if reader.byte_order == "S":
        raise CheckpointError(f"{path}: of the other byte order; take a little-endian file")
    return reader


def _biases(gguf: GgufModel) -> dict[str, bool]:
    return {"attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
            "mlp_bias": "blk.0.ffn_down.bias" in gguf.tensors}


def _vocab_size(gguf: GgufModel) -> int:
    embedding = gguf.tensors.get(TOP_NAMES[EMBEDDING])
    if embedding is None:
        raise CheckpointError(f"{gguf.path}: {TOP_NAMES[EMBEDDING]} is missing; fetch the file "
                              "again")
    return int(embedding.shape[-1])


def _rope(need: Fields, gguf: GgufModel, head_dim: int) -> dict[str, Any]:
    """``rope_parameters`` of config.json."""
    theta = need.number("rope.freq_base", 10_000.0)
    linear = need.number("rope.scale_linear", 1.0)
    kind = need.raw.get("rope.scaling.type") or ("none" if linear == 1.0 else "linear")
    factors = gguf.tensors.get(ROPE_FACTORS)
    if kind not in ("none", "linear") or (kind == "linear" and factors is not None):
        raise CheckpointError(f"{need.source}.rope.scaling.type is {kind!r}, which is not "
                              "supported; take the file without it, and --dca for longer texts")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": need.number("rope.scaling.factor", linear)}
    return rope if factors is None else rope | _llama3(gguf, factors, theta, head_dim)


def _llama3(gguf: GgufModel, tensor: Any, theta: float, head_dim: int) -> dict[str, Any]:
    """Return the released scaling whose divisors these are; the file says nothing else about it."""
    factors = _floats(tensor.data, tensor)
    if (factors == 1).all():
        return {}
    scaling = RopeScaling(kind="llama3", factor=max(1.0, float(factors.max())))
    expected = inverse_frequencies(head_dim, theta) / inverse_frequencies(head_dim, theta, scaling)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
        raise CheckpointError(f"{gguf.path}: {ROPE_FACTORS} is not Llama 3's scaling with its "
                              "released settings, and no other is supported")
    return {"rope_type": "llama3", "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings}


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all weights by their names in a checkpoint; the model has no storage."""
    rotary = build_rotary(head_dim=config.head_dim, rope_theta=config.rope_theta, max_model_len=1,
                          dca=None)
    model = CausalLM(config, layers=range(config.num_layers), rotary=rotary, plan=None,
                     dtype=torch.bfloat16, device="meta")
    return {name: target.shape for name, target in model.weight_targets().items()}


def _finer(gguf: GgufModel, *names: str) -> str:
    """Return the name of the copy of a matrix that is stored in more bits."""
    return max((name for name in names if name in gguf.tensors),
               key=lambda name: int(gguf.tensors[name].n_bytes))


def _check_types(gguf: GgufModel, names: set[str]) -> None:
    """Try one row of each type."""
    for tensor in {gguf.tensors[name].tensor_type: gguf.tensors[name] for name in names}.values():
        kind = tensor.tensor_type.name
        try:
            _floats(tensor.data[:1] if tensor.data.ndim > 1 else tensor.data, tensor)
        except NotImplementedError:
            raise CheckpointError(f"{gguf.path}: {tensor.name} is of type {kind}, which cannot be "
                                  "read; take a file of another quantisation") from None


def _planned(
    gguf: GgufModel, config: ModelConfig, name: str, source: Any, shape: tuple[int, ...]
) -> PlannedTensor:
    stored = tuple(reversed(source.shape.tolist()))
    if stored != shape:
        raise CheckpointError(f"{gguf.path}: {source.name} has shape {list(stored)}, its metadata "
                              f"asks for {list(shape)}")
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    order = None
    if heads is not None and config.architecture == "LlamaForCausalLM":
        # llama.cpp keeps the two halves of a head, which RoPE turns together, row by row
        order = np.arange(shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return PlannedTensor(name=name, shape=shape, source=source, order=order)


def _floats(data: Any, tensor: Any) -> Tensor:
    """Copy stored rows of a tensor to fp32."""
    return torch.tensor(dequantize(data, tensor.tensor_type), dtype=torch.float32)
