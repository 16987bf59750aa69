"""One optimizer step's forward and backward passes, in as many parts as memory asks for."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from longspan.errors import NotEnoughMemoryError
from longspan.train.batch import Batch
from longspan.train.model import CausalLM, RunLayer, hidden_states, run_layer
from longspan.train.objective import CrossEntropy, Objective, Targets
from longspan.train.world import World

EVALUATED_TOKENS = 16_384
log = logging.getLogger(__name__)


class Step(torch.nn.Module):
    """A model with its loss as one module, the root that FSDP shards.

    Args:
        rows_at_once: rows of a forward pass, at most; gradients of several add up. None: all.
    """

    def __init__(
        self, model: CausalLM, objective: Objective, world: World, *, run: RunLayer = run_layer,
        recompute: bool = False, rows_at_once: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.world = model, objective, world
        self.run, self.recompute, self.rows_at_once = run, recompute, rows_at_once

    def forward(self, part: Targets, total: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a part of the step, scaled to this process's share of the gradient's mean, and
        sums for the log."""
        is_cuda = part.ids.is_cuda
        dtype = torch.bfloat16 if is_cuda else torch.float32
        with torch.autocast(part.ids.device.type, dtype=torch.bfloat16, enabled=is_cuda):
            hidden = hidden_states(
                self.model, part.ids, self.run, dtype, self.recompute, self.world.context)
        loss, sums = self.objective(
            hidden, self.model.lm_head.weight, part, total, self.world.context)
        return loss * self.world.size, sums

    def targets(self, batch: Batch) -> Targets:
        """Return what this process predicts of its rows."""
        targets, context = Targets.of(batch), self.world.context
        if context.size == 1:
            return targets
        return targets.at(context.places(batch.ids.shape[1], batch.ids.device))

    @contextmanager
    def using(self, objective: Objective) -> Iterator[None]:
        """Compute another objective for a while."""
        own, self.objective = self.objective, objective
        try:
            yield
        finally:
            self.objective = own

    def backward(self, batch: Batch) -> dict[str, Tensor]:
        """Leave a step's gradients in the parameters; returns its sums for the log.

        When out of memory, it is computed once more with recomputed activations, then with half of
        the rows at once. Raises `NotEnoughMemoryError` when a single row does not fit.
        """
        try:
            return self._backward(batch)
        except torch.OutOfMemoryError as error:
            self._save_memory(batch, error)
        # Outside the handler, because the error's frames hold the activations.
        self.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return self.backward(batch)

    @torch.no_grad()
    def bits_per_byte(self, batch: Batch, cross_entropy: CrossEntropy) -> float | None:
        """Measure text that is all filler; None when there is less than a row for each process."""
        groups = self.world.num_row_groups
        batch = batch.rows(0, len(batch.ids) // groups * groups)
        if not len(batch.ids):
            return None
        targets = self.targets(self.world.rows(batch).to(self.world.device))
        sums = torch.zeros(2, device=self.world.device)
        at_once = max(1, EVALUATED_TOKENS // batch.ids.shape[1])
        with self.using(cross_entropy):
            for start in range(0, len(targets.ids), at_once):
                part = targets.rows(start, start + at_once)
                _, found = self(part, torch.ones((), device=self.world.device))
                sums += torch.stack((found["filler_nll"], found["filler_bytes"]))
        nll, num_bytes = self.world.sum(sums).tolist()
        return nll / max(1.0, num_bytes) / math.log(2)

    def _save_memory(self, batch: Batch, error: torch.OutOfMemoryError) -> None:
        rows, length = batch.ids.shape
        at_once = min(rows, self.rows_at_once or rows)
        together = self.objective.rows_together
        if self.world.size > 1 or (self.recompute and at_once <= together):
            raise NotEnoughMemoryError(
                f"a row of {length:,} tokens does not fit the memory ({str(error)[:120]}): train "
                "on shorter rows, on more processes, or with --context-parallel") from error
        if self.recompute:
            self.rows_at_once = max(together, at_once // 2 // together * together)
            log.warning("out of memory at %s: %s rows at once", (rows, length), self.rows_at_once)
        else:
            self.recompute = True
            log.warning("out of memory at %s: recomputing activations", (rows, length))

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        targets = self.targets(batch)
        total = self.world.sum(self.objective.total(targets, self.world.context)).clamp_min(1e-9)
        sums: dict[str, Tensor] = {}
        at_once = self.rows_at_once or len(batch.ids)
        for start in range(0, len(batch.ids), at_once):
            loss, found = self(targets.rows(start, start + at_once), total)
            loss.backward()
            for name, value in found.items():
                sums[name] = sums[name] + value if name in sums else value
        return sums
