"""Repairs of Triton 3.6's interpreter, so that a kernel computes there what it computes on a GPU.

- Interpreted scalars are arrays of shape [1], which numpy from 2.4 on refuses to turn into an int;
  loop bounds known only at run time need that.
- Rounding to e4m3 loses the carry into the exponent. Here PyTorch rounds.
- bf16 is kept as its bits in uint16: `tl.dot` multiplied the bits, arithmetic would add them, casts
  cut instead of rounding to nearest even. Here `tl.dot` and casts are right, and arithmetic on
  bf16, which kernels do in fp32 anyhow, is an error.

What it does again for each operation though the answer stays the same, it does once here: kernels
compute the same in a fifth of the time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch


def repair(patch: pytest.MonkeyPatch) -> None:
    """Until the end of the test."""
    from triton.runtime import interpreter

    original, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
    patch.setattr(builder, "create_dot", _create_dot)
    patch.setattr(builder, "cast_impl", _cast(builder.cast_impl))
    patch.setattr(builder, "create_fp_to_fp", _cast(builder.create_fp_to_fp))
    patch.setattr(builder, "binary_op", _without_bf16(builder.binary_op))
    _hasten(patch, interpreter)


def _hasten(patch: pytest.MonkeyPatch, interpreter: Any) -> None:
    """Nothing here changes what is computed.

    - A call of a function inside a kernel looked through all of `triton.language` for what to
      replace; it was replaced already when the kernel was launched.
    - Sums and products were computed again in int64, to compare with the largest int32 in an
      assertion that is dropped, as this is no debug build.
    - Types that are asked for by name, and shapes of tensors, were built anew each time.
    """
    from triton.language import core

    patch.setattr(interpreter.interpreter_builder, "options", dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False))
    patch.setattr(interpreter, "_patch_lang", _once(interpreter._patch_lang))
    patch.setattr(interpreter, "_get_np_dtype", _by_name(interpreter._get_np_dtype))

    patch.setattr(core.block_type, "__init__", _shape_once(core))
    scalar = core.constexpr(1), core.tuple([])

    def init(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.constants if type.is_block() else scalar

    patch.setattr(core.tensor, "__init__", init)


def _shape_once(core: Any) -> Any:
    """A block's type, whose shape is checked and put into words when it is first asked for."""
    original, known = core.block_type.__init__, dict[Any, tuple[Any, ...]]()

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(x.value if isinstance(x, core.constexpr) else x for x in shape)
        if key not in known:
            original(self, element_ty, shape)
            sizes = core.tuple([core.constexpr(x) for x in self.shape])
            known[key] = self.shape, self.numel, self.name, (core.constexpr(self.numel), sizes)
        self.element_ty = element_ty
        self.shape, self.numel, self.name, self.constants = known[key]

    return init


def _by_name(np_dtype: Any) -> Any:
    found: dict[str, Any] = {}

    def named(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in found:
            found[name] = np_dtype(dtype)
        return found[name]

    return named


def _once(patch_lang: Any) -> Any:
    """Replace builtins unless they are replaced: a launch puts the original ones back."""
    def patched(function: Any) -> Any:
        from triton import language

        inside = {id(value): value for value in function.__globals__.values()
                  if value is language or value is language.core}
        if any(language.core.is_builtin(lang.load) for lang in inside.values()):
            return patch_lang(function)
        return None

    return patched


def _create_dot(
    self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any
) -> Any:
    from triton.runtime.interpreter import TensorHandle

    product = np.matmul(_values(a), _values(b), dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _cast(original: Any) -> Any:
    """A cast from or to bf16 or e4m3 goes by way of fp32, rounded to nearest even."""
    def cast(self: Any, src: Any, dst_type: Any, *rounding: Any) -> Any:
        from triton.runtime.interpreter import TensorHandle, _get_np_dtype

        source, target = src.dtype.scalar, dst_type.scalar
        if not any(is_one(dtype) for is_one in (_is_bf16, _is_e4m3) for dtype in (source, target)):
            return original(self, src, dst_type, *rounding)
        values = _values(src).astype(np.float32)
        if _is_bf16(target):
            return TensorHandle(_to_bf16(values), target)
        if _is_e4m3(target):
            rounded = torch.from_numpy(values).to(torch.float8_e4m3fn)
            return TensorHandle(rounded.view(torch.uint8).numpy(), target)
        return TensorHandle(values.astype(_get_np_dtype(target)), target)

    return cast


def _without_bf16(original: Any) -> Any:
    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        assert not _is_bf16(lhs.dtype.scalar), "arithmetic on bf16: cast to fp32 first"
        return original(self, lhs, rhs, op)

    return binary_op


def _values(handle: Any) -> np.ndarray:
    """The numbers of a block; bf16 and e4m3 widened to fp32."""
    if _is_e4m3(handle.dtype.scalar):
        numbers = torch.from_numpy(np.ascontiguousarray(handle.data))
        return numbers.view(torch.float8_e4m3fn).float().numpy()
    if not _is_bf16(handle.dtype.scalar):
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_e4m3(dtype: Any) -> bool:
    return str(dtype) == "fp8e4nv"


def _is_bf16(dtype: Any) -> bool:
    return str(dtype) == "bf16"
