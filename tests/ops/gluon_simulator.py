"""Runs a Gluon kernel's own source on CPU tensors: partitions are threads, and TMA is one.

Triton's interpreter knows no Gluon. Here a module's `gl`, barriers, copies and products are
replaced by PyTorch's while a test runs, and its functions by what they were made of. What is
simulated is order: copies begin by filling their place with what is no number and end late, in any
order; products read their operands when they are waited for; barriers have phases and parities.
What a compiler does, layouts and instructions, is not: `tests/ops/compile_for_hopper.py` compiles.
"""

from __future__ import annotations

import builtins
import itertools
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

PATIENCE_S = 10.0
SLOWEST_COPY_S = 0.0005


class Pointer:
    """A tensor's memory and offsets into it."""

    def __init__(self, memory: Tensor, offset: Tensor | int = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offset + more)


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.shape, self.dtype = memory, list(memory.shape), memory.dtype

    def index(self, at: Any) -> Shared:
        return Shared(self.memory[int(at)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.memory.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.memory.permute(order))

    def load(self, layout: Any) -> Tensor:
        return self.memory.clone()

    def store(self, value: Tensor) -> None:
        self.memory.copy_(value)

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        return Shared(self.memory.view(dtype).view(shape))


class Barrier:
    """An mbarrier: so many arrivals, and all expected bytes, end a phase."""

    changed = threading.Condition()

    def __init__(self) -> None:
        self.count = self.arrivals = self.phase = self.num_bytes = 0

    def arrive(self, count: int = 1, num_bytes: int = 0) -> None:
        with self.changed:
            self.arrivals += count
            self.num_bytes += num_bytes
            assert self.arrivals <= self.count, "more arrivals than a phase has"
            if self.arrivals == self.count and self.num_bytes == 0:
                self.phase, self.arrivals = self.phase + 1, 0
            self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase & 1 != parity, PATIENCE_S), (
                f"deadlock: parity {parity}, phase {self.phase}, {self.arrivals} of {self.count}"
                f" arrivals, {self.num_bytes} bytes")


class Description:
    """A tensor descriptor."""

    def __init__(self, real: Any) -> None:
        self.tensor = real.base.as_strided(real.shape, real.strides)
        self.dtype, self.layout, self.block_shape = real.base.dtype, real.layout, real.block_shape


class Simulator:
    """Takes the place of a kernel: `simulator[grid](...)` runs each program."""

    def __init__(self, module: ModuleType, kernel: str, seed: int) -> None:
        self.module, self.kernel = module, getattr(module, kernel).fn
        self.rng = random.Random(seed)
        self.copies: list[tuple[Tensor, Tensor, Barrier, int]] = []
        self.program: tuple[int, ...] = (0, 0)
        self.grid = (1, 1)
        self.failures: list[BaseException] = []

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            self.grid = grid
            taken = [_argument(value) for value in args]
            for program in itertools.product(*map(builtins.range, grid)):
                self.program = program
                self.kernel(*taken, **constants)

        return launch

    def warp_specialize(self, partitions: Any, warps: Any, registers: Any) -> None:
        """Run all partitions side by side, and the copies beside them."""
        def work(function: Callable[..., None], args: tuple[Any, ...]) -> None:
            try:
                function(*_own(args))
            except BaseException as error:
                self.failures.append(error)

        is_over = threading.Event()
        threads = [threading.Thread(target=work, args=partition) for partition in partitions]
        engine = threading.Thread(target=work, args=(self._copy, (is_over,)))
        for thread in (*threads, engine):
            thread.start()
        for thread in threads:
            thread.join()
        is_over.set()
        engine.join()
        if self.failures:
            raise self.failures[0]

    def copy(self, desc: Description, at: list[Any], barrier: Barrier, smem: Shared) -> None:
        """Begin a copy: until it is over its place holds anything."""
        row, column = (int(x) for x in at)
        source = desc.tensor[row : row + desc.block_shape[0],
                             column : column + desc.block_shape[1]]
        assert list(source.shape) == smem.shape, "a tile that is not whole"
        smem.memory.fill_(0x7F7F if source.dtype == torch.int16 else float("nan"))
        with Barrier.changed:
            self.copies.append((smem.memory, source, barrier,
                                source.numel() * source.element_size()))

    def _copy(self, is_over: threading.Event) -> None:
        while not is_over.is_set() or self.copies:
            time.sleep(self.rng.random() * SLOWEST_COPY_S)
            with Barrier.changed:
                if not self.copies:
                    continue
                place, source, barrier, num_bytes = self.copies.pop(
                    self.rng.randrange(len(self.copies)))
            place.copy_(source)
            barrier.arrive(0, -num_bytes)

    def language(self) -> SimpleNamespace:
        """What stands for `gl`."""
        def layout(*args: Any, **options: Any) -> None:
            return None

        def binary(function: Any) -> Callable[[Any, Any], Tensor]:
            return lambda x, y: function(torch.as_tensor(x), torch.as_tensor(y))

        names = ("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout",
                 "SwizzledSharedLayout")
        return SimpleNamespace(
            **dict.fromkeys(names, layout), constexpr=lambda x: x, int16=torch.int16,
            int32=torch.int32, int64=torch.int64, float32=torch.float32, bfloat16=torch.bfloat16,
            arange=lambda start, stop, layout: torch.arange(start, stop, dtype=torch.int32),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            load=_load, store=_store, where=torch.where, exp2=torch.exp2, log2=torch.log2,
            maximum=binary(torch.maximum), minimum=binary(torch.minimum), sum=torch.sum,
            max=torch.amax, static_range=builtins.range,
            program_id=lambda axis: torch.tensor(self.program[axis], dtype=torch.int32),
            num_programs=lambda axis: self.grid[axis],
            associative_scan=lambda x, axis, function: x.cumsum(axis),
            allocate_shared_memory=_allocate, inline_asm_elementwise=_assembly,
            warp_specialize=self.warp_specialize)


def simulate(
    patch: pytest.MonkeyPatch, module: ModuleType, kernel: str, seed: int = 0,
) -> Simulator:
    """Until the end of the test the module's functions are PyTorch's. Returns its kernel."""
    simulator = Simulator(module, kernel, seed)
    for name, value in list(vars(module).items()):
        if type(value).__name__ == "constexpr":
            patch.setattr(module, name, value.value)
        elif hasattr(value, "fn"):
            patch.setattr(module, name, value.fn)
    replaced = {
        "gl": simulator.language(), "range": _range,
        "mbarrier": SimpleNamespace(
            init=lambda barrier, count: setattr(barrier, "count", count),
            arrive=lambda barrier, count: barrier.arrive(count),
            expect=lambda barrier, num_bytes: barrier.arrive(1, num_bytes),
            wait=lambda barrier, parity: barrier.wait(int(parity)), MBarrierLayout=lambda: None),
        "tma": SimpleNamespace(async_copy_global_to_shared=simulator.copy),
        "fence_async_shared": lambda: None, "warpgroup_mma": _product,
        "warpgroup_mma_wait": lambda pending, deps: (
            deps[0]() if len(deps) == 1 else tuple(dep() for dep in deps))}
    for name, value in replaced.items():
        patch.setattr(module, name, value, raising=False)
    return simulator


def _own(value: Any) -> Any:
    """Copy numbers: what a partition adds to them in place is its own."""
    if isinstance(value, tuple):
        return tuple(_own(part) for part in value)
    return value.clone() if isinstance(value, Tensor) else value


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        size = value.untyped_storage().nbytes() // value.element_size()
        return Pointer(value.as_strided((size,), (1,), 0), int(value.storage_offset()))
    return Description(value) if hasattr(value, "block_shape") else value


def _range(*bounds: Any) -> Iterator[Tensor]:
    for i in builtins.range(*(int(bound) for bound in bounds)):
        yield torch.tensor(i, dtype=torch.int32)


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if dtype == torch.int64:  # barriers
        barriers = [Barrier() for _ in builtins.range(shape[0])]
        return SimpleNamespace(index=lambda slot: barriers[int(slot)], shape=shape)
    return Shared(torch.full(shape, 0x7F7F if dtype == torch.int16 else float("nan"), dtype=dtype))


def _load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Tensor:
    offset, taken = torch.broadcast_tensors(
        torch.as_tensor(pointer.offset), torch.as_tensor(mask))
    inside = (offset >= 0) & (offset < len(pointer.memory))
    assert bool((inside | ~taken).all()), "a load outside of its tensor"
    found = pointer.memory[torch.where(taken, offset, 0).long()]
    return torch.where(taken, found, torch.as_tensor(other, dtype=found.dtype))


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    offset, value, taken = torch.broadcast_tensors(torch.as_tensor(pointer.offset), value, mask)
    pointer.memory[offset[taken].long()] = value[taken].to(pointer.memory.dtype)


def _product(
    a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False
) -> Callable[[], Tensor]:
    """Begin a product: operands are read when it is waited for."""
    def result() -> Tensor:
        left = a.memory if isinstance(a, Shared) else a
        before = acc() if callable(acc) else acc
        product = left.float() @ b.memory.float()
        return before + product if use_acc else product

    return result


def _assembly(
    source: str, constraints: str, inputs: list[Tensor], *, dtype: tuple[torch.dtype, ...],
    is_pure: bool, pack: int,
) -> tuple[Tensor, ...]:
    """Run straight lines of PTX over pairs of 16 bits, neighbours along the last dim."""
    registers = {f"${len(dtype) + i}": x.contiguous().view(torch.int32).long() & 0xFFFFFFFF
                 for i, x in enumerate(inputs)}

    def value(name: str) -> Tensor:
        return registers[name] if name in registers else torch.tensor(int(name, 16))

    for name, operands in re.findall(r"^\s*([a-z]\w+(?:\.\w+)+)\s+(.+);", source, re.M):
        target, *given = operands.split(", ")
        if name == "lop3.b32":
            parts = [value(x) for x in given[:3]]
            table, found = int(given[3], 16), torch.zeros_like(parts[0])
            for row in builtins.range(8):
                if table >> row & 1:
                    term = torch.full_like(found, 0xFFFFFFFF)
                    for part, bit in zip(parts, (4, 2, 1), strict=True):
                        term = term & (part if row & bit else ~part)
                    found = found | term & 0xFFFFFFFF
        elif name == "shr.u32":
            found = value(given[0]) >> int(given[1])
        else:
            assert name == "sub.rn.bf16x2", name
            x, y = (value(part).to(torch.int32).view(torch.bfloat16) for part in given)
            found = (x - y).view(torch.int32).long() & 0xFFFFFFFF
        registers[target] = found
    return tuple(registers[f"${i}"].to(torch.int32).view(kind) for i, kind in enumerate(dtype))
