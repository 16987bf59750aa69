"""What an engine has of the prefix cache besides its device, decided before it is loaded."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

from longspan.config import EngineConfig, ModelConfig
from longspan.engine.control.copy_queue import TierConfig
from longspan.engine.device.block_link import STAGE_BYTES, link_bytes
from longspan.engine.device.memory import (
    DeviceMemory,
    device_memory,
    host_memory,
    kv_block_bytes,
)
from longspan.engine.setup.disk_rate import sampled_bytes_per_s
from longspan.errors import LongspanError, NotEnoughMemoryError
from longspan.units import GIB, in_gib

logger = logging.getLogger("longspan.engine")
WAY_BYTES = {"cpu": 256 * 1024**2, "cuda": 2 * GIB}
"""Host memory for the way to disk and back, where nothing is kept in it."""
MIN_SLOTS = 8
COPY_BYTES_PER_S = {"cpu": 2e9, "cuda": 2e10}
"""Speed of copies between device and host before it was measured."""
COPY_BYTES = {"cpu": 64 * 1024**2, "cuda": 2 * STAGE_BYTES}
"""Size of one copy between device and host."""
COPY_SHARE = {"cpu": 0.2, "cuda": 0.8}
"""Copies under way, as a share of a step's budget: on CPUs they take the place of other work."""
UNHURRIED_S = 0.5
"""The same in seconds, where there is no budget."""


def plan_tiers(model: ModelConfig, config: EngineConfig, *, means: bool) -> TierConfig:
    """Decide sizes from what was asked.

    Args:
        config: resolved.
        means: the caches hold block means too.

    Raises `LongspanError` when ``kv_host_gib`` or ``kv_disk_gib`` holds only a few blocks, or the
    disk cannot be asked for its room.
    """
    if not config.kv_host_gib and config.kv_dir is None:
        return TierConfig()
    assert config.device is not None
    device_type, budget_s = config.device.split(":")[0], config.step_budget_s
    block_bytes = kv_block_bytes(model, config, means=means)
    host_bytes = int(config.kv_host_gib * GIB)
    if config.kv_host_gib:
        _check_size("kv_host_gib", config.kv_host_gib, block_bytes)
    else:
        host_bytes = max(WAY_BYTES[device_type], 4 * MIN_SLOTS * block_bytes)
    folder = Path(config.kv_dir).expanduser().absolute() if config.kv_dir else None
    rate = None if folder is None else sampled_bytes_per_s(folder)
    return TierConfig(
        num_slots=host_bytes // block_bytes, keeps_host=config.kv_host_gib > 0,
        block_bytes=block_bytes, copy_bytes=COPY_BYTES[device_type],
        copy_bytes_per_s=COPY_BYTES_PER_S[device_type],
        copy_s=COPY_SHARE[device_type] * budget_s if budget_s and math.isfinite(budget_s)
        else UNHURRIED_S,
        disk_bytes_per_s=rate or TierConfig().disk_bytes_per_s,
        folder="" if folder is None else str(folder),
        disk_bytes=_disk_bytes(config, block_bytes) if config.kv_dir else 0)


def memory_besides(config: EngineConfig, tiers: TierConfig) -> DeviceMemory:
    """Return the device's memory without what the places take of it.

    Raises `NotEnoughMemoryError` when the host has too little.
    """
    assert config.device is not None
    memory, host_bytes = device_memory(config.device), tiers.num_slots * tiers.block_bytes
    if not host_bytes:
        return memory
    host = memory if config.device == "cpu" else host_memory()
    if host_bytes > host.free_bytes:
        raise NotEnoughMemoryError(
            f"{in_gib(host_bytes)} for KV blocks in host memory, and {in_gib(host.free_bytes)} are "
            "free; lower kv_host_gib")
    taken = host_bytes if config.device == "cpu" else link_bytes(tiers.block_bytes)
    return DeviceMemory(
        total_bytes=memory.total_bytes, free_bytes=max(0, memory.free_bytes - taken))


def places_bytes(tiers: TierConfig) -> dict[str, int]:
    """Name what host memory and disk may hold, for people; empty: there is only the device."""
    found = dict[str, int]()
    if tiers.num_slots:
        name = "KV in host memory" if tiers.keeps_host else "host memory on the way to disk"
        found[name] = tiers.num_slots * tiers.block_bytes
    if tiers.folder:
        found["KV on disk, at most"] = tiers.disk_bytes
    return found


def _check_size(name: str, gib: float, block_bytes: int) -> None:
    """Raise `LongspanError` where a place would hold next to nothing."""
    num_bytes = int(gib * GIB)
    if num_bytes < MIN_SLOTS * block_bytes:
        raise LongspanError(
            f"{name} {gib:g} holds {num_bytes // block_bytes} blocks of "
            f"{block_bytes / 1024**2:.3g} MiB; use "
            f"{MIN_SLOTS * block_bytes / GIB:.2g} or more, or leave it out")


def _disk_bytes(config: EngineConfig, block_bytes: int) -> int:
    """Most that the files may take."""
    assert config.kv_dir is not None
    path = folder = Path(config.kv_dir).expanduser().absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        own = sum(item.stat().st_size for item in folder.glob("*"))
        room = shutil.disk_usage(path).free + own
    except OSError as error:
        raise LongspanError(f"kv_dir {config.kv_dir} cannot be used: {error.strerror}; name a "
                            "directory that this user may write") from None
    if config.kv_disk_gib is None:
        return room // 2
    _check_size("kv_disk_gib", config.kv_disk_gib, block_bytes)
    wanted = int(config.kv_disk_gib * GIB)
    if wanted > room:
        logger.warning("kv_disk_gib %g is more than the %s that kv_dir %s has; KV is written until "
                       "the disk is full", config.kv_disk_gib, in_gib(room), config.kv_dir)
    return wanted
