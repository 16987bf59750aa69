"""What ranks ask of NCCL; where there is none, a stand-in says what was asked."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from longspan.attention.spare_sms import EXCHANGE_SMS
from longspan.config import EngineConfig
from longspan.engine.ranks.hub import Hub
from longspan.engine.setup import group
from longspan.engine.setup.mesh import exchange_sms
from longspan.errors import LongspanError


@pytest.mark.parametrize(("options", "count"), [
    ({"device": "cuda:0", "context_parallel": 2}, EXCHANGE_SMS),
    ({"device": "cpu", "context_parallel": 2}, 0),
    ({"device": "cuda", "tensor_parallel": 2}, 0), ({"device": "cuda"}, 0),
    ({"device": "cuda", "context_parallel": 2, "tensor_parallel": 2}, 0)])
def test_exchanges_take_few_sms_where_they_run_beside_products(
    options: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nowhere else: sums of all activations wait for them."""
    def make(is_high_priority_stream: bool) -> SimpleNamespace:
        return SimpleNamespace(config=SimpleNamespace(max_ctas=0), first=is_high_priority_stream,
                               _timeout=None)

    monkeypatch.setattr(
        dist, "ProcessGroupNCCL", SimpleNamespace(Options=make), raising=False)
    config = EngineConfig(model="x", **options)
    assert exchange_sms(config) == count
    asked = group._options(config)
    assert (asked is None) is (count == 0)
    if asked is not None:
        assert asked.config.max_ctas == count and asked.first
        assert asked._timeout == timedelta(seconds=group.COLLECTIVE_S)


def test_a_slip_in_the_number_of_ranks_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "num_cores", lambda: 2)
    monkeypatch.setattr(Hub, "spawn", lambda *_: pytest.fail("ranks are started"))
    with pytest.raises(LongspanError, match="9 ranks on 2 cores: .*; ask for fewer ranks"):
        group.open_group(EngineConfig(model="nano", device="cpu", context_parallel=9))
