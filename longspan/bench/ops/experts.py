"""The section of `longspan bench ops` about routed experts: a whole layer's, as the model has it.

Rates count the experts' own products, and for decode the weights of the experts that some token
takes; the time is that of all there is between the norm and the residual stream: router, choice,
order, products, sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longspan import ops
from longspan.bench.ops import checks
from longspan.bench.ops.dense import LayerBench
from longspan.bench.session import CheckFailed, Unavailable
from longspan.bench.shapes import EXPERT_SHAPE, Shape
from longspan.bench.timing import rate, recorded, rounded
from longspan.model.experts import RoutedMLP
from longspan.ops import reference
from longspan.ops.moe import eager
from longspan.weight_form import FormKind, WeightForm, WeightForms

Add = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
QUANTISED: tuple[FormKind, ...] = ("fp8-rows", "fp8-blocks")
MAX_ROUNDED_ERROR = 0.06
"""Error ratio where activations are rounded to e4m3 too."""
READ_BYTES = 4 * 1024**3
STEPS = 8
"""Layers' worth of a decode step that are timed together."""


class ExpertBench:
    """Measurements of one layer's experts; of the shape, or of `EXPERT_SHAPE` where it has none."""

    def __init__(self, layer: LayerBench) -> None:
        self.layer, self.session, self.device = layer, layer.session, layer.device
        is_own = layer.shape.model.experts is not None
        self.is_small = is_own or self.device.startswith("cuda")
        """A CPU is not asked to multiply by gigabytes of another shape's experts."""
        self.shape = layer.shape if is_own else Shape.make(EXPERT_SHAPE)
        assert self.shape.model.experts is not None
        self.config, self.dim = self.shape.model.experts, self.shape.model.hidden_size

    def run(self) -> None:
        """Measure prefill by every way there is, then decode beside a plain read."""
        if not self.is_small:
            return
        self._mlp = self._make()
        for num_tokens in self.layer.options.expert_tokens:
            for impl in ("ours", "triton", "grouped_mm"):
                self.session.attempt(self._key("experts", impl, num_tokens),
                                     partial(self._prefill, impl, num_tokens), ours=impl == "ours")
        row = self.session.attempt(
            {"op": "read", "impl": "torch", "params": {"bytes": self._read_bytes}}, self._read)
        read = row["tb_per_s"] if row else None
        for num_tokens in self.layer.options.expert_batches:
            self.session.attempt(self._key("experts_decode", "ours", num_tokens),
                                 partial(self._decode, num_tokens, read))
        del self._mlp
        for kind in QUANTISED:
            self._run_quantised(kind)

    def _run_quantised(self, kind: FormKind) -> None:
        """Measure experts whose weights are quantised, prefill and decode."""
        mlp = RoutedMLP(self.dim, self.config, dtype=self.layer.dtype, device=self.device,
                        forms=WeightForms(WeightForm(kind)))
        if mlp.experts.gate_up.form.kind != kind:
            return  # sizes that it cannot cut
        mlp.gate.weight.normal_(0.0, 0.02)
        for linear in (mlp.experts.gate_up, mlp.experts.down):
            linear.fill_randomly(0.02, torch.Generator(self.device).manual_seed(0))
        for num_tokens in self.layer.options.expert_tokens:
            self.session.attempt(self._key("experts", kind, num_tokens),
                                 partial(self._quantised, mlp, num_tokens, recording=False))
        for num_tokens in self.layer.options.expert_batches:
            self.session.attempt(self._key("experts_decode", kind, num_tokens),
                                 partial(self._quantised, mlp, num_tokens, recording=True))

    def _quantised(self, mlp: RoutedMLP, num_tokens: int, *, recording: bool) -> dict[str, Any]:
        hidden, x = self._rows(num_tokens)
        weights, experts = ops.route(mlp.logits(x), mlp.num_chosen, mlp.is_normed)
        last = slice(-4, None)
        few, sums = torch.zeros_like(x[last], dtype=torch.float32), torch.zeros_like(x)
        eager.add_routed_mlp(few, x[last].float(), weights[last], experts[last].long(),
                             mlp.experts.gate_up_proj, mlp.experts.down_proj)
        mlp.add_to(sums, x)
        error = checks.error_ratio(sums[last], few)
        if not error <= MAX_ROUNDED_ERROR:
            raise CheckFailed(f"quantised experts are wrong: error ratio {error:.2e}; not timed")
        if recording:
            return {**self._steps(mlp, num_tokens, 1), "rel_error": rounded(error)}
        timing = self.layer.measure(partial(mlp.add_to, hidden, x))
        found = {**timing.fields(), "rel_error": rounded(error)}
        flops = 6.0 * num_tokens * self.config.num_chosen * self.dim * self.config.expert_size
        return {**found, "tflops": rate(flops, timing)}

    def _key(self, op: str, impl: str, num_tokens: int) -> dict[str, Any]:
        return {"op": op, "impl": impl, "params": {
            "shape": self.shape.name, "num_tokens": num_tokens,
            "experts": self.config.num_experts, "chosen": self.config.num_chosen}}

    def _make(self) -> RoutedMLP:
        mlp = RoutedMLP(self.dim, self.config, dtype=self.layer.dtype, device=self.device)
        for parameter in mlp.parameters():
            parameter.normal_(0.0, 0.02)
        return mlp

    def _rows(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Residual stream and normed rows, [T, M] each."""
        return (torch.randn(num_tokens, self.dim, device=self.device, dtype=self.layer.dtype),
                torch.randn(num_tokens, self.dim, device=self.device, dtype=self.layer.dtype))

    def _prefill(self, impl: str, num_tokens: int) -> dict[str, Any]:
        small = self.layer.require("experts", lambda: checks.check_experts(self.device))
        hidden, x = self._rows(num_tokens)
        weights, experts = ops.route(self._mlp.logits(x), self.config.num_chosen, True)
        add = way(impl, x, self._mlp)
        error = max(small, self._check(impl, add, x, weights, experts))

        def work() -> None:
            chosen = ops.route(self._mlp.logits(x), self.config.num_chosen, True)
            add(hidden, x, *chosen, *plain_matrices(self._mlp))
        timing = self.layer.measure(work)
        flops = 6.0 * num_tokens * self.config.num_chosen * self.dim * self.config.expert_size
        return {**timing.fields(), "tflops": rate(flops, timing), "rel_error": rounded(error)}

    def _check(self, impl: str, add: Add, x: Tensor, weights: Tensor, experts: Tensor) -> float:
        """Compute the last rows anew, on the very input that is timed."""
        matrices = plain_matrices(self._mlp)
        sums, few = torch.zeros_like(x), torch.zeros_like(x[-4:])
        add(sums, x, weights, experts, *matrices)
        reference.add_routed_mlp(few, x[-4:], weights[-4:], experts[-4:], *matrices)
        return checks.require_close(f"experts by {impl}", sums[-4:], few, x.dtype)

    @property
    def _read_bytes(self) -> int:
        return READ_BYTES if self.device.startswith("cuda") else READ_BYTES // 1024

    def _read(self) -> dict[str, Any]:
        """Measure what reading alone reaches, by a sum."""
        source = torch.ones(self._read_bytes // 4, dtype=torch.float32, device=self.device)
        timing = self.layer.measure(source.sum)
        return {**timing.fields(), "tb_per_s": rate(float(self._read_bytes), timing)}

    def _decode(self, num_tokens: int, read: float | None) -> dict[str, Any]:
        error = self.layer.require("experts", lambda: checks.check_experts(self.device))
        found = self._steps(self._mlp, num_tokens, self.layer.dtype.itemsize)
        return {**found, "rel_error": rounded(error),
                "ratio": rounded(found["tb_per_s"] / read) if read else None}

    def _steps(self, mlp: RoutedMLP, num_tokens: int, element_size: int) -> dict[str, Any]:
        """Time a layer's share of a decode step: several, on inputs of their own, are recorded one
        behind the other."""
        pairs = [self._rows(num_tokens) for _ in range(STEPS)]
        num_read = sum(len(ops.route(mlp.logits(x), mlp.num_chosen, mlp.is_normed)[1].unique())
                       for _, x in pairs) / STEPS

        def work() -> None:
            for hidden, x in pairs:
                mlp.add_to(hidden, x)
        timing = self.layer.measure(recorded(work, self.device), flush_cache=True).share(STEPS)
        num_bytes = 3.0 * num_read * self.dim * self.config.expert_size * element_size
        return {**timing.fields(), "tb_per_s": rate(num_bytes, timing), "experts_read": num_read}


def plain_matrices(mlp: RoutedMLP) -> tuple[Tensor, Tensor]:
    """Return the experts' weights, which are not quantised here: [E, 2F, M] and [E, M, F]."""
    gate_up, down = mlp.experts.gate_up_proj, mlp.experts.down_proj
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    return gate_up, down


def way(impl: str, x: Tensor, mlp: RoutedMLP) -> Add:
    """Return one way to add experts. Raises `Unavailable` where it cannot run here."""
    gate_up, down = plain_matrices(mlp)
    if impl == "ours":
        return ops.add_routed_mlp
    if not x.is_cuda:
        raise Unavailable(f"{impl} needs a CUDA GPU")
    from longspan.ops.moe import grouped
    from longspan.ops.moe import triton as kernels

    if impl == "grouped_mm":
        if not grouped.supports(x, gate_up, down):
            raise Unavailable("this PyTorch has no grouped product for these operands")
        return grouped.add_routed_mlp
    return kernels.add_routed_mlp
