"""`bench cache` on the CPU: the real engine on a tiny shape."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import Tensor

from longspan.bench.engine import cache, cache_copies, cache_driver, cache_options, disk_read
from longspan.bench.engine.cache_driver import sizes_for
from longspan.bench.engine.cache_options import CacheOptions
from longspan.bench.engine.engine import ShapeEngine, free_memory, open_engine, plan_engine
from longspan.bench.session import BenchOptions, BenchSession, CheckFailed
from longspan.bench.shapes import Shape
from longspan.commands import results
from longspan.engine.device.block_files import BlockFiles
from longspan.engine.device.block_store import BlockStore
from longspan.engine.transfer import Transfer
from longspan.errors import LongspanError
from longspan.units import GIB
from tests.bench.shapes_for_tests import tiny_shape

BLOCK_BYTES = 3 * 2 * 2 * 16 * 4 * 129
"""Those of `tiny_shape`: 128 tokens and their mean."""


def test_what_comes_back_from_host_memory_and_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cache_driver, "DECODED_LEN", 600)
    options = CacheOptions(lengths=(4_000,), places=("disk", "host"), folder=tmp_path / "kv",
                           chunk_len=512)
    session = BenchSession("cache", BenchOptions(device="cpu", out=tmp_path / "out"))
    assert cache.run(session, tiny_shape(), options) == 0
    (content,) = results.read_bench(tmp_path / "out", "cache")
    disk, host = content["rows"]
    assert (disk["place"], host["place"]) == ("disk", "host")
    for row in (disk, host):
        assert 3_000 < row["loaded_tokens"] <= 4_000 and row["num_tokens"] == 4_000
        assert 0 < row["load_s"] <= row["ttft_s"] < row["prefill_s"]
        assert row["gib_per_s"] > 0 and 0 < row["pause_s"] < row["step_budget_s"]
    assert host["save_s"] > 0 and min(disk["disk_own_gib_per_s"]) > 0
    assert disk["question_s"] < disk["prefill_s"] and disk["question_pause_s"] > 0
    assert "from" in capsys.readouterr().out
    assert not list((tmp_path / "kv").rglob("*.safetensors"))


def test_an_engine_is_gone_before_the_next_one_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though it was there when the garbage collector was told to look at nothing any more."""
    monkeypatch.setattr(cache_driver, "DECODED_LEN", 8)
    try:
        with open_engine(tiny_shape(), "cpu", sizes_for(1_000, 512)) as engine:
            runner, driver = engine.runner, cache_driver.begin(engine, sparse=False)
            driver.end()
        left = weakref.ref(runner), weakref.ref(driver)
        del engine, runner, driver
        free_memory("cpu")
        assert [each() for each in left] == [None, None]
    finally:
        gc.unfreeze()


def test_a_question_with_a_long_tail_evicts_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_driver, "DECODED_LEN", 300)
    monkeypatch.setattr(cache_driver, "QUESTION_LEN", 3_500)
    monkeypatch.setattr(cache_options, "BESIDE_BLOCKS", 8)
    written, dropped = list[int](), list[str]()
    write, drop = BlockFiles._write, BlockFiles._drop

    def note_write(files: BlockFiles, transfer: Transfer) -> None:
        written.append(len(transfer.slots))
        write(files, transfer)

    def note_drop(files: BlockFiles, transfer: Transfer) -> None:
        dropped.append(transfer.file)
        drop(files, transfer)

    monkeypatch.setattr(BlockFiles, "_write", note_write)
    monkeypatch.setattr(BlockFiles, "_drop", note_drop)
    options = CacheOptions(lengths=(4_000,), places=("disk",), folder=tmp_path / "kv",
                           chunk_len=3_584)
    session = BenchSession("cache", BenchOptions(device="cpu", out=tmp_path / "out"))
    assert cache.run(session, tiny_shape(), options) == 0, session.rows
    assert sum(written) > 31 + 20, "the question's tail was written too"
    assert not dropped and len(session.rows[0]["disk_own_gib_per_s"]) == 2


def test_two_prompts_in_turn_on_a_pool_that_holds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_driver, "DECODED_LEN", 300)
    options = CacheOptions(lengths=(2_500,), places=("host", "turns"), folder=tmp_path / "kv",
                           chunk_len=512, host_gib=24 * BLOCK_BYTES / GIB)
    session = BenchSession("cache", BenchOptions(device="cpu", out=tmp_path / "out"))
    assert cache.run(session, tiny_shape(), options) == 0
    host, row = session.rows
    assert host["prefill_s"] == row["prefill_s"] == pytest.approx(row["prefills_s"][0], rel=1e-3)
    assert host["pause"]["pause_s"] == host["pause_s"] > 0
    assert len(row["turns_s"]) == 4 and len(row["prefills_s"]) == 2
    assert row["host_gib"] * GIB < 1.3 * 2_500 / 128 * BLOCK_BYTES
    assert row["loaded_tokens"] > 1_500, "all but what was left on the device"
    assert max(row["turns_s"]) < min(row["prefills_s"])


def test_options_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for wrong in ({"places": ("moon",)}, {"attention": "both"}, {"folder": tmp_path}):
        fields = {"lengths": (1,), "places": ("host",), "folder": tmp_path / "kv", **wrong}
        with pytest.raises(LongspanError):
            CacheOptions(**fields)  # type: ignore[arg-type]


def test_a_disk_without_room_is_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000))
    options = CacheOptions(lengths=(5_000,), places=("disk",), folder=tmp_path / "kv")
    session = BenchSession("cache", BenchOptions(device="cpu", out=tmp_path / "out"))
    assert cache.run(session, tiny_shape(), options) == 1
    assert "are free in" in session.rows[0]["error"]


def test_files_that_stay_in_memory_are_not_timed_as_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(bytes(1 << 20))
    assert disk_read.cached_share(files) > 0.9, "they were just written"
    assert disk_read.read_bytes_per_s(files) > 0
    assert disk_read.cached_share(files) < 0.1
    monkeypatch.setattr("os.posix_fadvise", lambda *args: None)
    files[0].read_bytes()
    with pytest.raises(CheckFailed, match="stay in the page cache"):
        disk_read.forget(files)


def test_copies_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_driver, "DECODED_LEN", 600)
    monkeypatch.setattr(cache_copies, "STEP_S", 1e-3)
    options = CacheOptions(lengths=(6_000,), places=("copies",), folder=tmp_path / "kv",
                           chunk_len=512, host_gib=64 * BLOCK_BYTES / GIB)
    session = BenchSession("cache", BenchOptions(device="cpu", out=tmp_path / "out"))
    assert cache.run(session, tiny_shape(), options) == 0
    (row,) = session.rows
    assert 0 < row["load_s"] < row["ttft_s"] and 0 < row["load_host_s"] < row["load_s"]
    assert len(row["turns_s"]) == 4 and min(row["cached_tokens"]) > 5_000
    assert row["pause"]["pause_s"] == row["pause_s"] and row["pause"]["at_s"] > 0


def test_blocks_that_come_back_with_other_numbers_are_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoil(store: BlockStore, kind: str, slots: Tensor, blocks: Tensor) -> None:
        move(store, kind, slots, blocks)
        store.parts[0].rows[1][:, 0] = 0

    move = BlockStore._move
    monkeypatch.setattr(BlockStore, "_move", spoil)
    monkeypatch.setattr(cache_copies, "STEP_S", 1e-3)
    options = CacheOptions(lengths=(4_000,), places=("copies",), folder=tmp_path / "kv",
                           chunk_len=512, host_gib=64 * BLOCK_BYTES / GIB)
    session = BenchSession("cache", BenchOptions(device="cpu", out=tmp_path / "out"))
    assert cache.run(session, tiny_shape(), options) == 1
    assert "other numbers" in session.rows[0]["error"]


def test_a_cancelled_prompt_is_computed_once(tmp_path: Path) -> None:
    options = CacheOptions(lengths=(6_000,), places=("cancelled",), folder=tmp_path / "kv",
                           chunk_len=512)
    session = BenchSession("cache", BenchOptions(device="cpu", out=tmp_path / "out"))
    assert cache.run(session, tiny_shape(), options) == 0
    (row,) = session.rows
    assert 3_000 <= row["computed_tokens"] < 4_000 and row["found_tokens"] >= 2_560
    assert 0 <= row["computed_twice"] <= 512


def test_of_131072_tokens_cancelled_in_the_middle_only_what_is_missing_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real scheduler, with chunks and budget of nano on CPUs; nothing is computed."""
    length = 131_072
    monkeypatch.setattr(cache_copies, "STEP_S", 0.0)
    plan = plan_engine(Shape.make("nano"), "cpu", sizes_for(length, None, kv_host_gib=0.1))
    runner = cache_copies.CopyRunner(plan, "cpu")
    driver = cache_driver.Driver(
        ShapeEngine(plan, runner), sparse=True)  # type: ignore[arg-type]
    row, chunk_len = driver.prefill_twice(length), plan.config.prefill_chunk_len
    driver.end()
    runner.close()
    assert chunk_len is not None and chunk_len <= length // 8
    assert length // 2 <= row["computed_tokens"] <= length // 2 + 2 * chunk_len
    assert row["found_tokens"] >= length // 2
    assert row["computed_again"] == length - row["found_tokens"]
    assert 0 < row["computed_tokens"] + row["computed_again"] - length < chunk_len
