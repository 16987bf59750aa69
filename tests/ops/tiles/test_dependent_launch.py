"""Kernels begin early where a GPU can have them do so."""

from __future__ import annotations

import pytest
import torch

from longspan.ops.tiles.dependent_launch import early_launch


@pytest.mark.parametrize(("kind", "capability", "options"), [
    ("cpu", (9, 0), {"EARLY": False}), ("cuda", (8, 9), {"EARLY": False}),
    ("cuda", (9, 0), {"EARLY": True, "launch_pdl": True}),
    ("cuda", (10, 0), {"EARLY": True, "launch_pdl": True})])
def test_hopper_and_later_begin_early(
    kind: str, capability: tuple[int, int], options: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert early_launch.__wrapped__(torch.device(kind)) == options
