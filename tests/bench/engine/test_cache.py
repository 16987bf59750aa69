"""`bench cache` on the CPU: the real engine on a tiny shape."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.bench.engine import cache
from longspan.bench.engine.cache import CacheOptions
from longspan.bench.session import BenchOptions, BenchSession
from longspan.commands import results
from longspan.errors import LongspanError
from tests.bench.shapes_for_tests import tiny_shape


def test_what_comes_back_from_host_memory_and_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cache, "DECODED_LEN", 600)
    options = CacheOptions(lengths=(5_000,), places=("host", "disk"), folder=tmp_path / "kv",
                           chunk_len=512)
    session = BenchSession("cache", BenchOptions(device="cpu", out=tmp_path / "out"))
    assert cache.run(session, tiny_shape(), options) == 0
    (content,) = results.read_bench(tmp_path / "out", "cache")
    disk, host = content["rows"]
    assert (disk["place"], host["place"]) == ("disk", "host")
    for row in (disk, host):
        assert 4_000 < row["loaded_tokens"] <= 5_000 and row["num_tokens"] == 5_000
        assert 0 < row["load_s"] <= row["ttft_s"] < row["prefill_s"]
        assert row["gib_per_s"] > 0 and 0 < row["pause_s"] < row["step_budget_s"]
    assert host["save_s"] > 0 and disk["disk_own_s"] > 0
    assert "from" in capsys.readouterr().out
    assert not list((tmp_path / "kv").rglob("*.safetensors"))


def test_options_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for wrong in ({"places": ("moon",)}, {"attention": "both"}, {"folder": tmp_path}):
        fields = {"lengths": (1,), "places": ("host",), "folder": tmp_path / "kv", **wrong}
        with pytest.raises(LongspanError):
            CacheOptions(**fields)  # type: ignore[arg-type]
