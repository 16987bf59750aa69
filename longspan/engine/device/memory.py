"""Memory plan in bytes: what there is, what the model needs, how long a prompt can be."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from longspan.config import EngineConfig, ModelConfig
from longspan.engine.device.graphs import recorded_sizes
from longspan.engine.device.sampling import history_bytes
from longspan.engine.resolve import resolve_forms
from longspan.errors import LongspanError, NotEnoughMemoryError
from longspan.model.experts import expert_rows
from longspan.model.layers import mlp_rows
from longspan.units import DTYPE_BYTES, GIB, in_gib
from longspan.weight_sizes import scratch_bytes, weights_bytes

USABLE_SHARE = 0.9
GPU_RESERVE_BYTES = 6 * GIB
"""A GPU needs no more than this besides, however large it is: libraries' own buffers, holes between
tensors."""
CPU_POOL_REQUESTS = 4
"""Requests of full length that the KV pool holds on CPUs, where memory allows."""
GPU_POOL_SHARES = 2
"""Size of a GPU's KV pool, in multiples of what can run together, where memory allows: one for
the running requests, one for the prefix cache."""
ATTENTION_SCRATCH_BYTES = 512 * 1024**2
"""Score tiles, gathered keys and selection of one layer, beyond what grows with a step's tokens."""
SAMPLING_BYTES = 49
"""For each row and token of the vocabulary: logits and log-probabilities, 4 each, and beside them
sorted values, their order, probabilities and sums in fp64, 41 at once."""
LOGIT_BYTES = 16
"""The same where tokens are scored, not sampled (`head_rows`): logits as computed and in fp32,
exponentials, the choice of the most probable ones."""
KV_SCALE_BYTES = 4
"""For each token and head of int8 keys or values: fp32."""
RANK_BYTES = 8
"""Sampling needs this for each token of the vocabulary, however many rows there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """Memory of the device, bytes."""

    total_bytes: int
    free_bytes: int
    """What this process may still take; on CPUs within the container's limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Where the memory goes. All figures for one engine, bytes and tokens."""

    device: DeviceMemory
    budget_bytes: int
    """What the engine allows itself to use."""
    weights_bytes: int
    workspace_bytes: int
    """Activations of the largest step, sampling, rotation tables."""
    kv_bytes_per_token: int
    """Keys and values of one token over all layers, block means included."""
    num_blocks: int
    """KV blocks of the pool, see `pool_blocks`."""
    block_size: int
    max_model_len: int
    """Longest prompt plus completion that the engine accepts, tokens."""
    fitting_len: int
    """Longest context that the memory could hold, whatever the checkpoint claims, tokens."""

    @property
    def kv_bytes(self) -> int:
        """The whole KV pool."""
        return self.num_blocks * self.block_size * self.kv_bytes_per_token

    @property
    def context_bytes(self) -> int:
        """KV blocks of one context of full length."""
        blocks = -(-self.max_model_len // self.block_size)
        return blocks * self.block_size * self.kv_bytes_per_token

    @property
    def room_bytes(self) -> int:
        """What the budget leaves for KV caches; negative where it does not even hold the rest."""
        return self.budget_bytes - self.weights_bytes - self.workspace_bytes

    @property
    def needed_bytes(self) -> int:
        """Peak with one context of full length in the cache."""
        return self.weights_bytes + self.workspace_bytes + self.context_bytes

    @property
    def missing_bytes(self) -> int:
        """What the budget lacks for one context of full length; 0: it fits."""
        return max(0, self.needed_bytes - self.budget_bytes)


def plan_memory(
    model: ModelConfig, config: EngineConfig, *, max_step_tokens: int, means: bool,
    must_fit: bool = True, device: DeviceMemory | None = None,
) -> MemoryPlan:
    """Share the memory out between weights, workspace and KV cache.

    Args:
        config: resolved (device, dtype and both step sizes are set).
        max_step_tokens: most tokens that one step computes.
        means: the caches hold block means too.
        must_fit: False: a plan that does not fit is returned too, with its ``missing_bytes``.
        device: measured here when absent.

    Raises `NotEnoughMemoryError` when the weights, or a context of ``config.max_model_len`` tokens
    (of one block where that is open), do not fit; the message says what to change.
    """
    assert config.device is not None and config.dtype is not None
    num_requests = config.max_num_requests
    assert num_requests is not None
    device = device or device_memory(config.device)
    element = DTYPE_BYTES[config.dtype]
    per_token = -(-kv_block_bytes(model, config, means=means) // config.block_size)
    budget = usable_bytes(config.device, device)
    if config.memory_gib is not None:
        budget = min(int(config.memory_gib * GIB), device.total_bytes)

    weights = weights_bytes(model, resolve_forms(config, model), element)

    def plan(length: int, num_blocks: int = 0, fitting_len: int = 0) -> MemoryPlan:
        step_tokens = min(max_step_tokens, length * num_requests)
        return MemoryPlan(
            device=device, budget_bytes=budget, weights_bytes=weights,
            workspace_bytes=workspace_bytes(model, config, step_tokens, max_model_len=length),
            kv_bytes_per_token=per_token, block_size=config.block_size, max_model_len=length,
            num_blocks=num_blocks, fitting_len=fitting_len)

    fitting_len = _longest(plan, config.block_size, budget // per_token)
    length = config.max_model_len or min(
        model.max_position_embeddings, max(fitting_len, config.block_size))
    empty = plan(length)
    if empty.missing_bytes and must_fit:
        raise no_fit(config, empty, [f"lower max_model_len to {fitting_len}"] if fitting_len
                     else [])
    room = max(empty.room_bytes, empty.context_bytes)
    return plan(length, pool_blocks(config, room // per_token, length), fitting_len)


def kv_block_bytes(model: ModelConfig, config: EngineConfig, *, means: bool) -> int:
    """Return the bytes of one KV block of all layers on one rank: keys, values, their scales and
    their means. ``config`` is resolved."""
    assert config.dtype is not None
    numbers, element = model.kv_elements_per_token, DTYPE_BYTES[config.dtype]
    per_token = numbers * element
    if config.kv_dtype == "int8":
        per_token = numbers + numbers // model.head_dim * KV_SCALE_BYTES
    elif config.kv_dtype is not None:
        per_token = numbers * DTYPE_BYTES[config.kv_dtype]
    if config.kv_parts > 1:  # means are made of what prefill collects
        return per_token * config.block_size // config.kv_parts
    return per_token * config.block_size + numbers * element * means


def usable_bytes(device_name: str, device: DeviceMemory) -> int:
    """Return what an engine allows itself where nobody says."""
    usable = int(USABLE_SHARE * device.free_bytes)
    if device_name.startswith("cuda"):
        return max(usable, device.free_bytes - GPU_RESERVE_BYTES)
    return usable


def _longest(plan: Callable[[int], MemoryPlan], block_size: int, limit: int) -> int:
    """Find the most tokens, in whole blocks and at most ``limit``, whose plan fits; or 0."""
    low, high = 0, limit // block_size + 1  # low fits (nothing), high does not
    while high - low > 1:
        middle = (low + high) // 2
        if plan(middle * block_size).missing_bytes:
            high = middle
        else:
            low = middle
    return low * block_size


def pool_blocks(config: EngineConfig, room: int, max_model_len: int) -> int:
    """KV blocks of the pool, where the memory has room for ``room`` tokens.

    A GPU is the engine's own: all that the budget leaves, as long as there is any use for it.
    A CPU's memory is not. A block takes it once it is written, and the prefix cache writes all of
    them in time, so the pool holds a few requests of full length.
    """
    assert config.device is not None and config.max_num_requests is not None
    is_gpu = config.device.startswith("cuda")
    num_requests = GPU_POOL_SHARES * config.max_num_requests if is_gpu else CPU_POOL_REQUESTS
    return min(room // config.block_size,
               num_requests * -(-max_model_len // config.block_size))


def workspace_bytes(
    model: ModelConfig, config: EngineConfig, num_tokens: int, max_model_len: int | None = None,
) -> int:
    """Upper estimate of what a step of ``num_tokens`` needs besides weights and KV cache.

    ``config`` is resolved: device, dtype and requests are set. ``model`` has the DCA in effect:
    rotation tables are as long as the context without. ``max_model_len``: default: the claim.
    """
    assert config.device is not None and config.dtype is not None
    num_requests = config.max_num_requests
    assert num_requests is not None
    element = DTYPE_BYTES[config.dtype]
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    # Residual stream, its norm and the sum: 3 M; q, k, v and their rotated copies, the output. GPU
    # kernels read the queries rotated for each of three zones.
    zones = 2 * model.num_heads * model.head_dim if config.device.startswith("cuda") else 0
    per_token = (3 * model.hidden_size + 2 * heads + zones) * element
    mlp = _mlp_bytes(model, num_tokens, config.device.split(":")[0], element)
    # Every row may ask for all that a request can.
    sampling = (model.vocab_size * (num_requests * SAMPLING_BYTES + RANK_BYTES)
                + history_bytes(model.vocab_size, num_requests))
    rows = max_model_len or model.max_position_embeddings
    rotary = 4 * model.head_dim * (min(rows, model.dca.chunk_size + 1) if model.dca else rows)
    graphs = _graph_bytes(model, num_requests, 1 + (config.context_parallel > 1)) if (
        config.device.startswith("cuda")) else 0
    plain = scratch_bytes(
        model, resolve_forms(config, model), element, config.device.split(":")[0])
    scratch = ATTENTION_SCRATCH_BYTES + plain
    # one layer's keys and values of a request are written out in the type that is computed in
    layer = rows * model.kv_elements_per_token // model.num_layers * element
    if config.kv_dtype is not None:
        scratch += layer
    # or collected, twice: a paused chunk keeps its own; the half of what arrives, and what is sent
    if config.kv_parts > 1:
        scratch += 2 * layer + layer // 2 + layer // (2 * config.kv_parts)
    return num_tokens * per_token + mlp + sampling + rotary + graphs + scratch


def _mlp_bytes(model: ModelConfig, num_tokens: int, device_type: str, element: int) -> int:
    """Return what the largest MLP needs for the rows that it computes at a time."""
    rows = min(num_tokens, mlp_rows(device_type))
    found = rows * (3 * model.intermediate_size * element + 2 * model.hidden_size * 4)
    if model.experts is None:
        return found
    # each token once for every expert that it takes: gathered, gate and up, their product, the
    # output; its probabilities of all experts; the shared expert
    experts, rows = model.experts, min(num_tokens, expert_rows(device_type))
    routed = experts.num_chosen * (2 * model.hidden_size + 3 * experts.expert_size)
    shared = 3 * experts.shared_size + model.hidden_size
    output = 4 * model.hidden_size * (experts.num_chosen if device_type == "cpu" else 1)
    token = (routed + shared) * element + output + 16 * experts.num_experts
    return max(found, rows * token)


def head_rows(vocab_size: int) -> int:
    """Rows that the head is applied to at a time for log-probabilities of a prompt. They fit what
    attention has needed just before, so that no plan grows for them."""
    return max(1, ATTENTION_SCRATCH_BYTES // (LOGIT_BYTES * vocab_size))


def _graph_bytes(model: ModelConfig, num_requests: int, kinds: int) -> int:
    """Return the bytes that decode graphs keep (`longspan.engine.device.graphs`): logits for
    each graph, and one workspace for sampling, shared by all, for the largest. With ranks that
    share keys there are twice as many."""
    rows = recorded_sizes(num_requests)
    return model.vocab_size * (2 * kinds * 4 * sum(rows) + SAMPLING_BYTES * max(rows))


def peak_memory_bytes(device: str = "cpu") -> int:
    """Highest use so far: of the process on CPUs, of torch's allocator on GPUs."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_memory(device: str) -> DeviceMemory:
    """Measure the device's memory and what is free of it now.

    Raises `LongspanError` for a GPU that is not there.
    """
    if device.startswith("cuda"):
        index, count = torch.device(device).index or 0, torch.cuda.device_count()
        if index >= count:
            raise LongspanError(
                f"device {device} is not there; the last GPU of this machine is cuda:{count - 1}")
        free, total = torch.cuda.mem_get_info(torch.device(device))
        return DeviceMemory(total_bytes=total, free_bytes=free)
    return host_memory()


def host_memory(
    cgroup_root: Path = Path("/sys/fs/cgroup"), own_cgroup: Path = Path("/proc/self/cgroup"),
) -> DeviceMemory:
    """Measure RAM, or the container's share of it where that is less."""
    import psutil

    machine = psutil.virtual_memory()
    total, free = int(machine.total), int(machine.available)
    for limit, used in _cgroup_limits(cgroup_root, own_cgroup):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return DeviceMemory(total_bytes=total, free_bytes=free)


def _cgroup_limits(root: Path, own_cgroup: Path) -> list[tuple[int, int]]:
    """(limit, used) in bytes of this process's group and those around it, cgroup version 2 and 1.
    The page cache does not count as used."""
    found: list[tuple[int, int]] = []
    for folder in _groups(root, own_cgroup):
        _add_limit(found, folder, "memory.max", "memory.current", "")
    _add_limit(found, root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    return found


def _groups(root: Path, own_cgroup: Path) -> list[Path]:
    """Folders of the version 2 groups that hold this process, innermost first."""
    lines = own_cgroup.read_text().splitlines() if own_cgroup.is_file() else []
    own = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    folder = root / own
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]


def _add_limit(
    found: list[tuple[int, int]], folder: Path, limit_name: str, used_name: str, prefix: str,
) -> None:
    limit, used = _read_number(folder / limit_name), _read_number(folder / used_name)
    if limit is not None and used is not None:
        found.append((limit, max(0, used - _page_cache(folder / "memory.stat", prefix))))


def _page_cache(stat_file: Path, prefix: str) -> int:
    """Bytes of file pages, which the kernel gives back under pressure."""
    if not stat_file.is_file():
        return 0
    rows = (line.split() for line in stat_file.read_text().splitlines())
    values = {row[0]: int(row[1]) for row in rows if len(row) == 2}
    return sum(values.get(f"{prefix}{name}", 0) for name in ("inactive_file", "active_file"))


def _read_number(file: Path) -> int | None:
    """Read the number in a cgroup file; None without the file or a limit ("max")."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def no_fit(
    config: EngineConfig, plan: MemoryPlan, remedies: Sequence[str],
) -> NotEnoughMemoryError:
    """Make the error of a plan that does not fit, in one line.

    Args:
        remedies: what to do about the length, if there is anything.
    """
    found = list(remedies)
    if config.dtype == "float32":
        found.insert(0, "use dtype bfloat16")
    if config.memory_gib is not None:
        found.insert(0, "raise memory_gib")
    found.append("use a smaller model or a device with more memory")
    return NotEnoughMemoryError(
        f"{config.model} needs {in_gib(plan.needed_bytes)} on {config.device} (weights "
        f"{in_gib(plan.weights_bytes)}, workspace {in_gib(plan.workspace_bytes)}, KV cache of "
        f"{plan.max_model_len} tokens {in_gib(plan.context_bytes)}), and may use "
        f"{in_gib(plan.budget_bytes)}; {', or '.join(found)}")
