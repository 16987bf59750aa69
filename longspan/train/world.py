"""The processes of a run: who has which rows, and with context parallelism which places of them.

Started by torchrun, the processes form a grid: rows are divided over its first axis, the places of
each row over its second (context parallelism). Weights and optimizer are sharded over all of them
(FSDP2). One process alone is the same without any of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from longspan.errors import LongspanError
from longspan.train.batch import Batch
from longspan.train.phases import Shape


@dataclass(frozen=True, slots=True)
class ContextGroup:
    """The processes that share a row; ``process_group`` None: this one alone.

    A row is cut into twice as many pieces as there are processes; each has one from the beginning
    and the one as far from the end, so that all have the same attention to compute.
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

    def sum(self, values: Tensor) -> Tensor:
        """Add up what each process has; no gradients."""
        if self.process_group is not None:
            values = values.clone()
            dist.all_reduce(values, group=self.process_group)
        return values

    def pieces(self) -> tuple[int, int]:
        """Numbers of this process's two pieces."""
        return self.rank, 2 * self.size - 1 - self.rank

    def places(self, length: int, device: torch.device) -> Tensor:
        """Positions in a row of ``length`` that this process has, int64 [length / size]."""
        if self.size == 1:
            return torch.arange(length, device=device)
        step = length // (2 * self.size)
        return torch.cat([torch.arange(i * step, (i + 1) * step, device=device)
                          for i in self.pieces()])

    def gather(self, values: Tensor) -> Tensor:
        """Whole rows of what each process has some places of: [B, K, T / size, D] to [B, K, T, D].

        Gradients come back summed over the processes.
        """
        gathered: Tensor = _Gather.apply(values, self)
        return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ContextGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(values) for _ in range(group.size)]
        dist.all_gather(parts, values.contiguous(), group=group.process_group)
        halves = [part.chunk(2, 2) for part in parts]
        return torch.cat([first for first, _ in halves] + [last for _, last in halves[::-1]], 2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group.process_group)
        pieces = grad.chunk(2 * ctx.group.size, 2)
        return torch.cat([pieces[i] for i in ctx.group.pieces()], 2), None


@dataclass(frozen=True, slots=True)
class World:
    """The grid of processes, and this one's place in it."""

    device: torch.device
    rank: int = 0
    size: int = 1
    context: ContextGroup = ContextGroup()
    mesh: DeviceMesh | None = None
    """All processes in one row; None: this one alone."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def num_row_groups(self) -> int:
        """Groups that the rows of a step are divided over."""
        return self.size // self.context.size

    def check_shape(self, shape: Shape, rows_together: int) -> None:
        """Raise `LongspanError` when the rows of a step cannot be divided."""
        rows, length = shape
        if rows % (self.num_row_groups * rows_together):
            raise LongspanError(
                f"a step of {rows} rows of {length:,} tokens cannot be divided over "
                f"{self.num_row_groups} groups of processes: raise --tokens-per-step, or share "
                "rows by --context-parallel")
        if length % (2 * self.context.size):
            raise LongspanError(f"rows of {length:,} tokens cannot be cut into "
                                f"{2 * self.context.size} pieces: lower --context-parallel")

    def rows(self, batch: Batch) -> Batch:
        """Return this process's rows of a step."""
        share = len(batch.ids) // self.num_row_groups
        start = self.rank // self.context.size * share
        return batch.rows(start, start + share)

    def sum(self, values: Tensor) -> Tensor:
        """Add up over all processes; no gradients."""
        if self.mesh is not None:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of the processes."""
        if self.mesh is None:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def shard(self, step: torch.nn.Module, layers: torch.nn.ModuleList) -> None:
        """Shard a module's parameters over all processes; its layers are gathered one by one."""
        if self.mesh is None:
            return
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.device.type == "cuda":
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in layers:
            fully_shard(layer, mesh=self.mesh, mp_policy=policy)
        fully_shard(step, mesh=self.mesh, mp_policy=policy)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.mesh is not None:
            dist.barrier()


def whole(value: Any) -> Any:
    """Return a sharded tensor as a whole one on the CPU; every process must ask for it."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, Tensor) else value


def like(value: Any, model: Any) -> Any:
    """Return a whole tensor sharded as another is."""
    if isinstance(model, DTensor) and isinstance(value, Tensor) and value.ndim:
        return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)
    return value


@contextmanager
def joined_world(device: str, context_parallel: int = 1) -> Iterator[World]:
    """Join the processes that torchrun started; without it, a world of one.

    Raises `LongspanError` when the number of processes cannot be so divided.
    """
    if not dist.is_torchelastic_launched():
        if context_parallel != 1:
            raise LongspanError(f"--context-parallel {context_parallel} needs as many processes: "
                                "start them with torchrun")
        yield World(torch.device(device))
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield arrange(device, context_parallel)
    finally:
        dist.destroy_process_group()


def arrange(device: str, context_parallel: int) -> World:
    """Arrange the processes that have joined to a grid. Raises `LongspanError` when their number
    cannot be so divided."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if context_parallel < 1 or size % context_parallel:
        raise LongspanError(f"--context-parallel {context_parallel} does not divide the {size} "
                            "processes")
    place = torch.device(device)
    if device == "cuda":
        place = torch.device(device, rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
    grid = init_device_mesh(device, (size // context_parallel, context_parallel),
                            mesh_dim_names=("rows", "context"))
    context = ContextGroup()
    if context_parallel > 1:
        context = ContextGroup(rank % context_parallel, context_parallel,
                               grid.get_group("context"))
    return World(place, rank, size, context, init_device_mesh(device, (size,)))
