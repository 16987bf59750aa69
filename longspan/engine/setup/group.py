"""From a configuration to a group of ranks: what each tells of itself, and their collectives."""

from __future__ import annotations

import socket
from dataclasses import asdict, replace
from datetime import timedelta
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from longspan.config import EngineConfig, ModelConfig
from longspan.cores import num_cores
from longspan.engine.device.memory import DeviceMemory, device_memory
from longspan.engine.ranks.channel import STALL_S
from longspan.engine.ranks.hub import MEET_S, FollowerOrders, Hub
from longspan.engine.ranks.messages import Facts
from longspan.engine.resolve import resolve_config, resolve_forms
from longspan.engine.setup.mesh import RankMesh, exchange_sms
from longspan.errors import LongspanError
from longspan.model.fingerprint import weights_fingerprint
from longspan.model.tensor_share import check_share
from longspan.model.weights import resolve_checkpoint
from longspan.rank_place import RankPlace

COLLECTIVE_S = 3600.0
"""Longest wait for another rank in a collective. Ranks that are gone are noticed otherwise; ranks
that compile kernels are waited for."""
SAME_EVERYWHERE = ("dtype", "max_model_len", "attention", "positions", "recall", "weights",
                   "quantization",
                   "prefill_chunk_len", "block_size", "context_parallel", "divides_kv",
                   "pipeline_parallel", "tensor_parallel")
HUB_KEY, OPEN_TOKEN = "longspan/hub", "longspan"
"""Where torchrun's store has rank 0's port and the token; the token where there is no store."""
RANKS_A_CORE = 4
"""More of them on CPUs are taken for a slip: they would only take the machine's time."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def open_group(asked: EngineConfig) -> tuple[EngineConfig, Hub | None]:
    """Start the other ranks that an engine asks for on this machine, and wait until they are there.

    Returns the configuration of rank 0, and the hub; None: there is one rank.

    Raises `LongspanError` when they cannot be started, or do not fit together.
    """
    if asked.num_ranks == 1:
        return asked, None
    if dist.is_initialized():
        raise LongspanError("torch.distributed is in use in this process, and ranks need it for "
                            "themselves; use one engine with several ranks in each process")
    config = resolve_config(asked, has_cuda=torch.cuda.is_available())
    assert config.device is not None
    if asked.place is not None:
        return _receive(asked, asked.place, config.device)
    size = config.num_ranks
    if config.weights == "checkpoint":  # before any rank is started
        model = ModelConfig.from_dir(resolve_checkpoint(config.model))
        check_share(model, resolve_forms(config, model), config.tensor_parallel)
    if ":" in config.device:
        raise LongspanError(f"device {config.device} is one GPU, and {size} ranks take the first "
                            f"{size}; use device cuda")
    if config.device == "cuda" and size > torch.cuda.device_count():
        raise LongspanError(f"{size} ranks need as many GPUs, and this machine has "
                            f"{torch.cuda.device_count()}")
    if config.device == "cpu" and size > RANKS_A_CORE * num_cores():
        raise LongspanError(f"{size} ranks on {num_cores()} cores: each needs a core of its own to "
                            "bring anything; ask for fewer ranks")
    configs = [of_rank(replace(asked, device=config.device), rank, size)
               for rank in range(size)]
    hub = Hub(size)
    try:
        hub.store = f"file:{hub.directory}/store"
        hub.spawn(configs[1:])
        hub.meet(facts_of(configs[0]))
    except BaseException:
        hub.close()
        raise
    return configs[0], hub


def _receive(asked: EngineConfig, place: RankPlace, device: str) -> tuple[EngineConfig, Hub]:
    """Wait, as rank 0, for the ranks that torchrun has started."""
    config = of_rank(replace(asked, device=device), place.local_rank, place.local_size)
    port = 0 if place.has_store else place.port
    hub = Hub(place.size, address=place.address, port=port,
              token="" if place.has_store else OPEN_TOKEN)
    try:
        if place.has_store:
            _torchrun_store(place).set(HUB_KEY, f"{hub.port} {hub.token}")
        hub.kept = store = TCPStore(place.address, 0, None, True, wait_for_workers=False)
        hub.store = f"tcp:{place.address}:{store.port}"
        hub.meet(facts_of(config))
    except BaseException:
        hub.close()
        raise
    return config, hub


def orders_of(asked: EngineConfig, place: RankPlace) -> FollowerOrders:
    """Return what a rank that torchrun has started is to do; it asks torchrun where rank 0 is."""
    config = resolve_config(asked, has_cuda=torch.cuda.is_available())
    port, token = place.port, OPEN_TOKEN
    if place.has_store:
        number, token = _torchrun_store(place).get(HUB_KEY).decode().split()
        port = int(number)
    return FollowerOrders(
        address=place.address, port=port, token=token, rank=place.rank, stall_s=STALL_S,
        config=of_rank(replace(asked, device=config.device), place.local_rank, place.local_size))


def _torchrun_store(place: RankPlace) -> Store:
    return TCPStore(place.address, place.port, None, False, timedelta(seconds=MEET_S))


def of_rank(config: EngineConfig, local_rank: int, num_local: int) -> EngineConfig:
    """Return the configuration of one of a machine's ranks: its GPU, or its share of the cores."""
    if config.device != "cpu":
        return replace(config, device=f"cuda:{local_rank}")
    return replace(config, num_threads=config.num_threads or max(1, num_cores() // num_local))


def group_memory(hub: Hub | None) -> DeviceMemory | None:
    """Return the memory that every rank has; None: there is one rank."""
    if hub is None:
        return None
    return DeviceMemory(total_bytes=hub.total_bytes, free_bytes=hub.free_bytes)


def facts_of(config: EngineConfig) -> Facts:
    """Tell what the others must know of this rank. ``config`` has its device."""
    assert config.device is not None
    memory = device_memory(config.device)
    boot = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ""
    given = asdict(config)
    return Facts(
        host=f"{socket.gethostname()} {boot}", device=config.device,
        total_bytes=memory.total_bytes, free_bytes=memory.free_bytes, versions=_versions(),
        checkpoint=_checkpoint(config), options={name: given[name] for name in SAME_EVERYWHERE},
        backend=_backend(config.device))


def join_group(rank: int, config: EngineConfig, store: str) -> RankMesh:
    """Meet the other ranks in torch.distributed; on the thread that computes."""
    size, device = config.num_ranks, config.device
    assert device is not None
    if device != "cpu":
        torch.cuda.set_device(device)
    kind, _, place = store.partition(":")
    if kind == "file":
        meeting: Store = FileStore(place, size)
    else:
        host, _, port = place.rpartition(":")
        meeting = TCPStore(host, int(port), None, False)
    dist.init_process_group(
        _backend(device), store=meeting, rank=rank, world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_S), pg_options=_options(config),
        device_id=None if device == "cpu" else torch.device(device))
    return RankMesh.join(rank, config)


def _options(config: EngineConfig) -> Any:
    """Return NCCL's options, where exchanges run beside matrix products: few SMs, and those that
    become free first."""
    count = exchange_sms(config)
    if not count:
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = count
    options._timeout = timedelta(seconds=COLLECTIVE_S)  # PyTorch warns where it is another one
    return options


def _backend(device: str) -> str:
    if device == "cpu":
        return "gloo" if dist.is_available() and dist.is_gloo_available() else ""
    return "nccl" if dist.is_available() and dist.is_nccl_available() else ""


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for name in ("longspan", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _checkpoint(config: EngineConfig) -> str:
    """Digest what the numbers depend on; "" where no weights are read."""
    if config.weights != "checkpoint":
        return ""
    path = resolve_checkpoint(config.model)
    digest = blake2b(weights_fingerprint(path).encode(), digest_size=16)
    plans = [path / "sparsity_plan.json"] if config.sparsity_plan is None else [
        Path(config.sparsity_plan)]
    for file in (path / "config.json", *plans):
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()
