"""Products that leave SMs free do so as long as they should, and nothing else does."""

from __future__ import annotations

import pytest

from longspan.attention import spare_sms as module
from longspan.attention.ranks import RankGroup


def test_products_beside_an_exchange_leave_its_sms_free(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = list[int | None]()
    monkeypatch.setattr(module, "_set_carveout", noted.append)
    with RankGroup(0, 2).beside():
        assert noted == []
    with RankGroup(0, 2, num_sms=16).beside():
        assert noted[-1] == 16
    noted.clear()
    with RankGroup(0, 2, num_sms=16).beside():
        assert noted == [16]
    assert noted == [16, None]
    with pytest.raises(ZeroDivisionError), RankGroup(0, 2, num_sms=8).beside():
        raise ZeroDivisionError
    assert noted == [16, None, 8, None]


def test_without_the_knob_everything_is_computed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_set_carveout", None)
    with RankGroup(0, 2, num_sms=16).beside():
        pass


def test_pytorch_has_the_knob_and_warns_nobody(recwarn: pytest.WarningsRecorder) -> None:
    """It may go with a later PyTorch: then products wait, and this test says so."""
    assert module._set_carveout is not None
    with module.spare_sms(4):
        pass
    assert not recwarn.list
