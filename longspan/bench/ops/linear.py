"""The section of `longspan bench ops` about products with weights: each form beside plain ones.

The merged projections of one layer, with many rows as a prefill has them and with few as a decode
step. Times with many rows include rounding the activations where they arrive plain; ``-fused`` is
the product alone, of rows that a norm or SwiGLU has rounded already. Errors are those of the last
rows against the weights that the form stands for, in fp32: of e4m3 activations about 0.03.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longspan.bench.ops.checks import error_ratio
from longspan.bench.ops.dense import LayerBench
from longspan.bench.session import CheckFailed, Unavailable
from longspan.bench.timing import rate, recorded, rounded
from longspan.model.forms import make_linear
from longspan.model.linear import Activations, Linear
from longspan.ops.quant import eager
from longspan.weight_form import PLAIN_FORMS, FormKind, WeightForm
from longspan.weight_sizes import layer_matrices

KINDS: tuple[FormKind, ...] = ("plain", "fp8-rows", "fp8-blocks", "int4")
NAMES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
MAX_ERROR = 0.06
CHECKED_ROWS = 4
COLD_BYTES, MOST_COPIES = 512 * 1024**2, 64
"""A product of few rows is timed in a graph of several, each with weights of its own, as a decode
step has them: several L2 caches full."""
GROUP = 128


class LinearBench:
    """Measurements of one layer's products."""

    def __init__(self, layer: LayerBench) -> None:
        self.layer, self.session, self.device = layer, layer.session, layer.device

    def run(self) -> None:
        """Measure every product in every form, one matrix at a time."""
        options = self.layer.options
        model = self.layer.shape.model
        for name, matrix in zip(NAMES, layer_matrices(model, PLAIN_FORMS, 0), strict=False):
            for kind in KINDS:
                if matrix.copies > 1:
                    continue  # experts have a section of their own
                linear = self._make(kind, matrix.sizes, matrix.in_features)
                if linear.form.kind != kind:
                    continue  # sizes that it cannot cut
                for num_rows in options.linear_rows:
                    for is_fused in (False, True) if kind.startswith("fp8") else (False,):
                        impl = f"{kind}-fused" if is_fused else kind
                        self.session.attempt(
                            self._key("linear", impl, name, num_rows),
                            partial(self._many, linear, num_rows, is_fused), ours=not is_fused)
                for num_rows in options.few_rows:
                    self.session.attempt(self._key("linear_few", kind, name, num_rows),
                                         partial(self._few, linear, num_rows))
                del linear

    def _key(self, op: str, impl: str, name: str, num_rows: int) -> dict[str, Any]:
        return {"op": op, "impl": impl,
                "params": self.layer.params(product=name, num_tokens=num_rows)}

    def _make(self, kind: FormKind, sizes: tuple[int, ...], width: int) -> Linear:
        linear = make_linear(WeightForm(kind, GROUP), width, sizes, dtype=self.layer.dtype,
                             device=self.device)
        linear.fill_randomly(0.02, torch.Generator(self.device).manual_seed(0))
        return linear

    def _rows(self, linear: Linear, num_rows: int) -> Tensor:
        return torch.randn(
            num_rows, linear.in_features, device=self.device, dtype=self.layer.dtype)

    def _many(self, linear: Linear, num_rows: int, is_fused: bool) -> dict[str, Any]:
        x = self._rows(linear, num_rows)
        group = linear.group_of(x)
        if is_fused and group is None:
            raise Unavailable("activations are not rounded here")
        error = self._check(linear, x)
        rows: Activations = x
        if is_fused and group is not None:
            from longspan.ops.quant import triton_rows

            rows = triton_rows.quantize(x, group)
        timing = self.layer.measure(lambda: linear(rows))
        flops = 2.0 * num_rows * sum(linear.sizes) * linear.in_features
        return {**timing.fields(), "tflops": rate(flops, timing), "rel_error": rounded(error)}

    def _few(self, linear: Linear, num_rows: int) -> dict[str, Any]:
        x = self._rows(linear, num_rows)
        error = self._check(linear, x)
        num_bytes = sum(part.numel() * part.element_size() for part in linear.parameters())
        count = 1
        if self.device.startswith("cuda"):
            count = max(1, min(MOST_COPIES, COLD_BYTES // num_bytes))
        copies = [linear, *(copy.deepcopy(linear) for _ in range(count - 1))]

        def work() -> None:
            for one in copies:
                one(x)
        timing = self.layer.measure(
            recorded(work, self.device), flush_cache=True).share(len(copies))
        return {**timing.fields(), "tb_per_s": rate(float(num_bytes), timing),
                "rel_error": rounded(error)}

    def _check(self, linear: Linear, x: Tensor) -> float:
        """Compare the last rows. Raises `CheckFailed` where the product is wrong."""
        weights = linear.stack(1)
        plain = weights if isinstance(weights, Tensor) else eager.dequantize(
            type(weights)(*(part[0] for part in weights if part is not None)), torch.float32)
        expected = x[-CHECKED_ROWS:].float() @ plain.reshape(-1, linear.in_features).float().T
        error = error_ratio(linear(x)[-CHECKED_ROWS:], expected)
        if not error <= MAX_ERROR:
            raise CheckFailed(f"products of {linear.form.kind} are wrong: error ratio {error:.2e}, "
                              f"at most {MAX_ERROR}; not timed")
        return error
