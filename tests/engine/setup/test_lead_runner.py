"""What is left of a group of ranks when its first one ends."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from longspan.engine.setup.lead_runner import LeadRunner, RankThread


def close() -> Any:
    raise RuntimeError("a lost rank's memory cannot be freed")


@pytest.mark.parametrize("end", [bool, close])
def test_the_process_may_start_other_ranks_afterwards(
    end: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the runner's own end fails; and no collection of a large process is waited for,
    which takes longer than all else here and is for NCCL alone."""
    collected: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda *_: collected.append(1))
    hub: Any = SimpleNamespace(close=lambda: None, check=lambda: None)
    runner: Any = SimpleNamespace(close=end)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        LeadRunner(runner, hub, RankThread(hub)).close()
        assert not dist.is_initialized() and not collected
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
