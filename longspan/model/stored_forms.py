"""Matrices of a checkpoint as they are stored: which tensors make one, and what they mean.

Layouts, of a matrix [N, K] with G groups of K, eight nibbles to an int32 word, the first one low:

- plain: ``weight`` [N, K];
- fp8: ``weight`` e4m3 with ``weight_scale_inv`` or ``weight_scale``: one number, [N], [N, 1] or
  [N / 128, K / 128]. ``input_scale`` is of no use here: activations are quantised by their own
  numbers where they are;
- GPTQ: ``qweight`` [K / 8, N], ``qzeros`` [G, N / 8], ``scales`` [G, N], ``g_idx`` [K]. Version 1
  stores zero points less one;
- AWQ: ``qweight`` [K, N / 8], ``qzeros`` [G, N / 8], ``scales`` [G, N]; the eight nibbles of a word
  are columns 0, 2, 4, 6, 1, 3, 5, 7;
- compressed-tensors int4: ``weight_packed`` [N, K / 8], ``weight_scale`` [N, G],
  ``weight_zero_point`` [N / 8, G] (absent: 8), ``weight_g_idx`` [K], ``weight_shape`` [2].

Sources: AutoGPTQ and GPTQModel (`pack`), AutoAWQ (`WQLinear_GEMM`), compressed-tensors
(`pack_to_int32`), transformers (fp8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.errors import CheckpointError
from longspan.model.linear import Cut, Stored
from longspan.ops import pack_int4
from longspan.ops.types import FP8_BLOCK, Fp8Weights, Int4Weights
from longspan.quantization import CheckpointQuantization

SUFFIXES = ("weight_scale_inv", "weight_scale", "input_scale", "qweight", "qzeros", "scales",
            "g_idx", "weight_packed", "weight_zero_point", "weight_g_idx", "weight_shape")
"""Tensors of quantised matrices besides ``weight``."""
KV_SCALES = ("k_scale", "v_scale")
"""Scales of 8-bit KV caches, which the cache here does not need."""
PER_WORD, AWQ_COLUMNS = 8, (0, 2, 4, 6, 1, 3, 5, 7)
SYMMETRIC_ZERO = 8
Parts = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """One matrix in a checkpoint."""

    shapes: Mapping[str, tuple[tuple[int, ...], ...]]
    """Tensors that are needed, by suffix, and the shapes that each may have."""
    decode: Callable[[Parts], Stored]
    """Makes the matrix of them. Raises `CheckpointError` for numbers that mean nothing."""


def layout_of(
    module: str, shape: tuple[int, ...], has: Callable[[str], bool], is_fp8: bool,
    config: CheckpointQuantization | None,
) -> Layout:
    """Return how a module's matrix is stored.

    Args:
        shape: [N, K], or of a plain tensor.
        has: whether the checkpoint has a tensor of the module, by suffix.
        is_fp8: its ``weight`` is stored as e4m3.

    Raises `CheckpointError` where the layout cannot be.
    """
    if config is not None and has("qweight"):
        if config.method not in ("gptq", "awq"):
            raise _other(module, "qweight", config)
        return _gptq(module, shape, has, config) if config.method == "gptq" else _awq(
            module, shape, config)
    if config is not None and has("weight_packed"):
        if (config.method, config.form.kind) != ("compressed-tensors", "int4"):
            raise _other(module, "weight_packed", config)
        return _packed(module, shape, has, config)
    if config is not None and is_fp8:
        if not config.form.kind.startswith("fp8"):
            raise _other(module, "a weight of e4m3", config)
        is_inverse = has("weight_scale_inv") or (
            not has("weight_scale") and (config.method, config.form.kind) == ("fp8", "fp8-blocks"))
        return _fp8(module, shape, "weight_scale_inv" if is_inverse else "weight_scale")
    return Layout({"weight": (shape,)}, lambda parts: parts["weight"])


def cut_stored(stored: Stored, cut: Cut) -> Stored:
    """Return the rows or columns of a matrix that one rank has; they keep blocks and groups
    whole."""
    assert not isinstance(stored, Int4Weights) or stored.order is None or cut.columns is None
    if isinstance(stored, Tensor):
        return _picked(stored, cut, 1, 1)
    if isinstance(stored, Fp8Weights):
        unit = FP8_BLOCK if stored.is_blocked else 1
        return Fp8Weights(_picked(stored.values, cut, 1, 1), _picked(
            stored.scales, cut if stored.is_blocked else Cut(rows=cut.rows), unit, unit))
    group = stored.group
    return stored._replace(
        packed=_picked(stored.packed, cut, 1, 2), scales=_picked(stored.scales, cut, 1, group),
        zeros=_picked(stored.zeros, cut, 1, group))


def _picked(x: Tensor, cut: Cut, height: int, width: int) -> Tensor:
    """Pick rows and columns of a tensor whose elements stand for ``height`` x ``width`` ones."""
    for dim, ranges, unit in ((0, cut.rows, height), (1, cut.columns, width)):
        if ranges is not None:
            assert all(border % unit == 0 for pair in ranges for border in pair)
            x = torch.cat([x.narrow(dim, start // unit, (stop - start) // unit)
                           for start, stop in ranges], dim)
    return x


def _other(module: str, found: str, config: CheckpointQuantization) -> CheckpointError:
    return CheckpointError(f"{module} has {found}, which does not fit the quantization_config of "
                           f"method {config.method} in config.json; fetch both files again")


def _fp8(module: str, shape: tuple[int, ...], name: str) -> Layout:
    """``name``: of the scales."""
    rows, columns = shape
    blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))

    def decode(parts: Parts) -> Fp8Weights:
        scales = parts[name].float()
        if scales.numel() in (1, rows) and scales.shape != blocks:
            scales = scales.reshape(-1, 1).expand(rows, 1)
        elif scales.numel() == 1 and blocks == (1, 1):
            scales = scales.reshape(1, 1)
        _refuse_senseless(module, name, scales)
        return Fp8Weights(parts["weight"], scales)

    return Layout({"weight": (shape,), name: ((), (1,), (rows,), (rows, 1), blocks)}, decode)


def _gptq(module: str, shape: tuple[int, ...], has: Callable[[str], bool],
          config: CheckpointQuantization) -> Layout:
    rows, columns = shape
    groups = _groups(module, shape, config)

    def decode(parts: Parts) -> Int4Weights:
        numbers = _nibbles(parts["qweight"].t()).contiguous()
        zeros = (_nibbles(parts["qzeros"]).t() + config.zero_offset) & 15
        index = parts.get("g_idx")
        return _int4(module, numbers, parts["scales"].t(), zeros, index)

    shapes = {"qweight": ((columns // PER_WORD, rows),), "scales": ((groups, rows),),
              "qzeros": ((groups, rows // PER_WORD),)}
    return Layout(shapes | ({"g_idx": ((columns,),)} if has("g_idx") else {}), decode)


def _awq(module: str, shape: tuple[int, ...], config: CheckpointQuantization) -> Layout:
    rows, columns = shape
    groups = _groups(module, shape, config)
    places = torch.tensor(AWQ_COLUMNS).argsort()

    def unpack(words: Tensor) -> Tensor:
        """[n, N / 8] to [N, n]."""
        return _nibbles(words).unflatten(1, (-1, PER_WORD))[:, :, places].flatten(1).t()

    def decode(parts: Parts) -> Int4Weights:
        return _int4(module, unpack(parts["qweight"]).contiguous(), parts["scales"].t(),
                     unpack(parts["qzeros"]), None)

    return Layout({"qweight": ((columns, rows // PER_WORD),), "scales": ((groups, rows),),
                   "qzeros": ((groups, rows // PER_WORD),)}, decode)


def _packed(module: str, shape: tuple[int, ...], has: Callable[[str], bool],
            config: CheckpointQuantization) -> Layout:
    rows, columns = shape
    groups = _groups(module, shape, config)
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "weight_packed": ((rows, columns // PER_WORD),), "weight_scale": ((rows, groups),)}
    if has("weight_zero_point"):
        shapes["weight_zero_point"] = ((-(-rows // PER_WORD), groups),)
    if has("weight_g_idx"):
        shapes["weight_g_idx"] = ((columns,),)

    def decode(parts: Parts) -> Int4Weights:
        zeros = torch.full((rows, groups), SYMMETRIC_ZERO, dtype=torch.uint8)
        if "weight_zero_point" in parts:
            zeros = _nibbles(parts["weight_zero_point"].t()).t()[:rows]
        return _int4(module, _nibbles(parts["weight_packed"]), parts["weight_scale"], zeros,
                     parts.get("weight_g_idx"))

    return Layout(shapes, decode)


def _groups(module: str, shape: tuple[int, ...], config: CheckpointQuantization) -> int:
    """Count the groups of a row; raises `CheckpointError` for a shape that cannot be packed."""
    rows, columns = shape
    group = config.form.group or columns
    fitted = config.form.fitting((rows,), columns)
    if fitted.kind != "int4" or columns % group or rows % PER_WORD:
        raise CheckpointError(
            f"{module} [{rows}, {columns}] cannot be int4 in groups of {group}: widths and groups "
            f"must be multiples of 32, rows of {PER_WORD}; use the bf16 checkpoint")
    return columns // group


def _nibbles(words: Tensor) -> Tensor:
    """[n, m] int32 to [n, 8 m] uint8, the low half-byte first."""
    octets = words.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), -1).flatten(1)


def _int4(module: str, numbers: Tensor, scales: Tensor, zeros: Tensor,
          index: Tensor | None) -> Int4Weights:
    """numbers: [N, K]; scales, zeros: [N, G]; index: [K], the group of each input, or None."""
    _refuse_senseless(module, "scales", scales, may_be_zero=True)
    narrow = scales.half()
    if not narrow.isfinite().all():
        raise CheckpointError(f"{module}: a scale is beyond fp16; use the bf16 checkpoint")
    order, (columns, groups) = None, (numbers.shape[1], scales.shape[1])
    if index is not None and not torch.equal(index, _in_order(columns, groups)):
        counts = torch.bincount(index.long().clamp(0, groups), minlength=groups)
        if not torch.equal(counts, torch.full((groups,), columns // groups)):
            raise CheckpointError(
                f"{module}: g_idx does not name {columns // groups} inputs for each of {groups} "
                "groups; fetch the file again, or use the bf16 checkpoint")
        order = index.long().argsort(stable=True)
        numbers = numbers[:, order]
    return Int4Weights(pack_int4(numbers), narrow, zeros.to(torch.uint8),
                       None if order is None else order.to(torch.int32))


def _in_order(columns: int, groups: int) -> Tensor:
    return torch.arange(columns, dtype=torch.int32) // (columns // groups)


def _refuse_senseless(
    module: str, name: str, scales: Tensor, *, may_be_zero: bool = False
) -> None:
    """Refuse scales that are NaN, infinite, or no size."""
    is_sound = scales.isfinite() & (scales >= 0 if may_be_zero else scales > 0)
    if not is_sound.all():
        raise CheckpointError(f"{module}: {name} has numbers that are not finite or not positive; "
                              "fetch the file again")
