"""What one logging window amounts to."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longspan.train.phases import Shape
from longspan.train.world import World


@dataclass(slots=True)
class Meter:
    """Sums of one logging window, on the device until read."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    num_tokens: int = 0
    num_steps: int = 0
    flops: float = 0.0
    shape: Shape = (0, 0)
    """The last batch's."""
    rate: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, shape: Shape, flops: float, rate: float, values: Mapping[str, Tensor]) -> None:
        """Add one step's sums."""
        self.shape, self.rate = shape, rate
        self.num_tokens += math.prod(shape)
        self.num_steps += 1
        self.flops += flops
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value.detach()

    def read(self, world: World) -> dict[str, float | None]:
        """Means of the window over all processes; None for what it had nothing of. Synchronises."""
        names = sorted(self.sums)
        stacked = world.sum(torch.stack([self.sums[name].float() for name in names]))
        s = dict(zip(names, stacked.tolist(), strict=True))
        seconds = time.perf_counter() - self.started
        found: dict[str, float | None] = {"loss": s["loss"] / self.num_steps}
        if s.get("filler_bytes"):
            found["bits_per_byte"] = s["filler_nll"] / max(1.0, s["filler_bytes"]) / math.log(2)
        if "pairs" in s:
            found |= {"margin": s["margin"] / s["pairs"], "right_pairs": s["right"] / s["pairs"]}
        return found | {
            "answer_accuracy": s["answer_hits"] / s["answers"] if s["answers"] else None,
            "tokens_per_s": self.num_tokens / seconds,
            "tflops": self.flops / seconds / world.size / 1e12, "seconds": seconds}
