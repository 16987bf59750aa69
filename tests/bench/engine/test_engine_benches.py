"""`bench ttft` and `bench decode` on the CPU: the real engine on a tiny shape."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from longspan import ops
from longspan.bench import timing
from longspan.bench.engine import decode, engine, ttft
from longspan.bench.engine.decode import DecodeOptions
from longspan.bench.engine.ttft import TtftOptions
from longspan.bench.session import BenchOptions, BenchSession, CheckFailed
from longspan.bench.timing import LinearRegions, Regions
from longspan.commands import results
from longspan.errors import LongspanError, NotEnoughMemoryError
from longspan.expert_config import ExpertConfig
from longspan.model.experts import RoutedMLP
from longspan.model.linear import plain_linear
from longspan.model.qwen2 import CausalLM
from tests.bench.shapes_for_tests import tiny_shape


def session(bench: str, folder: Path) -> BenchSession:
    return BenchSession(bench, BenchOptions(device="cpu", out=folder))


def rows_of(folder: Path, bench: str) -> list[dict[str, Any]]:
    (content,) = results.read_bench(folder, bench)
    rows: list[dict[str, Any]] = content["rows"]
    return rows


def ttft_options(**values: Any) -> TtftOptions:
    defaults: dict[str, Any] = {"lengths": (1500,), "attention": ("dense", "sparse"),
                                "layers": None, "chunk_len": 512, "memory_gib": None}
    return TtftOptions(**{**defaults, **values})


def test_ttft_of_dense_and_sparse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ttft.run(session("ttft", tmp_path), tiny_shape(), ttft_options(runs=2)) == 0
    dense, sparse = rows_of(tmp_path, "ttft")
    assert (dense["attention"], dense["density"], dense["plan"]) == ("dense", 1.0, None)
    assert sparse["attention"] == "sparse" and 0 < sparse["density"] < 0.9
    assert sparse["plan"] == "test-tile-correction-strided16-scouts16-owntail64"
    for row in (dense, sparse):
        assert row["ttft_s"] > 0 and row["ttft_scaled_s"] == row["ttft_s"]
        assert row["n"] == 2 and row["ttft_s"] == pytest.approx(sum(row["runs_s"]) / 2, rel=1e-3)
        assert "compiled" not in row
        assert (row["layers"], row["total_layers"], row["chunk_len"]) == (3, 3, 512)
        assert row["share"]["linear"] > 0 and row["share"]["attention"] > 0
        assert sum(row["share"].values()) == pytest.approx(1, abs=1e-3)
        assert row["share"]["rest"] > 0
    assert dense["share"]["selection"] == 0 < sparse["share"]["selection"]
    assert "3/3" in capsys.readouterr().out


def test_kernels_compiled_while_timed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a GPU; a prefill that is timed should have none."""
    kernel: Any = SimpleNamespace(fn=timing.noting_compilations)
    monkeypatch.setattr(JITFunction, "_do_compile", lambda kernel, key: f"compiled {key}")
    with timing.noting_compilations("cuda:0") as names:
        assert JITFunction._do_compile(kernel, 3) == "compiled 3"
    JITFunction._do_compile(kernel, 4)
    assert names == ["noting_compilations"]
    with timing.noting_compilations("cpu") as names:
        JITFunction._do_compile(kernel, 5)
    assert names == []


@pytest.mark.parametrize("quantization", ["fp8", "int4", "int8"])
def test_ttft_of_quantised_weights(tmp_path: Path, quantization: str) -> None:
    options = ttft_options(quantization=quantization, attention=("dense",), lengths=(600,))
    assert ttft.run(session("ttft", tmp_path), tiny_shape(), options) == 0
    (row,) = rows_of(tmp_path, "ttft")
    assert row["quantization"] == quantization and row["share"]["linear"] > 0


def test_ttft_of_keys_in_eight_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ttft_options(kv_dtype="int8", attention=("sparse",), lengths=(600,))
    assert ttft.run(session("ttft", tmp_path), tiny_shape(), options) == 0
    (row,) = rows_of(tmp_path, "ttft")
    assert row["kv_dtype"] == "int8" and row["ttft_s"] > 0
    assert "int8 KV" in capsys.readouterr().out


@pytest.mark.parametrize("chunk_len", [512, None])
def test_a_later_success_replaces_the_row_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_len: int | None,
) -> None:
    options = ttft_options(attention=("dense",), lengths=(600,), chunk_len=chunk_len)
    with monkeypatch.context() as broken:
        broken.setattr(ttft, "_measure", lambda *_: 1 / 0)
        assert ttft.run(session("ttft", tmp_path), tiny_shape(), options) == 1
    assert "error" in rows_of(tmp_path, "ttft")[0]
    assert ttft.run(session("ttft", tmp_path), tiny_shape(), options) == 0
    (row,) = rows_of(tmp_path, "ttft")
    assert row["ttft_s"] > 0 and row["chunk_len"] == (chunk_len or 16_384)


def test_some_layers_only(tmp_path: Path) -> None:
    options = ttft_options(layers=2, attention=("sparse",))
    assert ttft.run(session("ttft", tmp_path), tiny_shape(), options) == 0
    (row,) = rows_of(tmp_path, "ttft")
    assert (row["layers"], row["total_layers"]) == (2, 3)
    share = row["share"]["attention"] + row["share"]["selection"]
    # attention of one whole layer for two, everything else of two for three
    expected = row["ttft_s"] * (2 * share + 1.5 * (1 - share))
    assert row["ttft_scaled_s"] == pytest.approx(expected, rel=1e-3)


def test_one_layer_measures_nothing() -> None:
    with pytest.raises(LongspanError, match="--layers 1"):
        ttft_options(layers=1)


def test_what_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.sparse_prefill_attention

    def wrong(*args: Any) -> Any:
        out, lse, kept = right(*args)
        return out * 1.1, lse, kept
    monkeypatch.setattr(ops, "sparse_prefill_attention", wrong)
    assert ttft.run(session("ttft", tmp_path), tiny_shape(), ttft_options()) == 1
    dense, sparse = rows_of(tmp_path, "ttft")
    assert dense["ttft_s"] > 0
    assert "sparse_prefill_attention out is wrong" in sparse["error"]


def test_logits_must_be_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = CausalLM.logits
    monkeypatch.setattr(CausalLM, "logits", lambda model, hidden: compute(model, hidden) / 0)
    sizes = engine.EngineSizes(max_model_len=601, num_tokens=601, chunk_len=512)
    with engine.open_engine(tiny_shape(), "cpu", sizes) as opened, \
            pytest.raises(CheckFailed, match="not finite"):
        ttft.prefill(opened, 600, "cpu", sparse=False)


def test_caches_hold_random_numbers() -> None:
    sizes = engine.EngineSizes(max_model_len=601, num_tokens=601, chunk_len=512)
    with engine.open_engine(tiny_shape(), "cpu", sizes) as opened:
        parts = [part for cache in opened.runner.caches for part in cache if part is not None]
        assert len(parts) == 12 and all(0.8 < float(part.std()) < 1.2 for part in parts)


def test_shares_of_linear_layers_are_all_products_with_weights() -> None:
    layer = plain_linear(4, 3, dtype=torch.float32, device="cpu")
    torch.nn.init.ones_(layer.weight)
    x, sums = torch.ones(2, 4), torch.zeros(2, 3)
    regions = Regions("cpu")
    with LinearRegions(regions, "linear"):
        for work, count in ((lambda: layer(x), 1), (lambda: layer.part(x, slice(2)), 2),
                            (lambda: layer.add_to(sums, x), 3), (lambda: x + x @ x.T[:, :1], 3)):
            work()
            assert len(regions._reads["linear"]) == count
        with regions.region("outer"):
            layer(x)
    layer(x)
    with LinearRegions(regions, "linear"):  # the router, and its experts once
        RoutedMLP(4, ExpertConfig(num_experts=3, num_chosen=2, expert_size=8),
                  dtype=torch.float32, device="cpu").add_to(torch.zeros(2, 4), x)
    assert len(regions._reads["linear"]) == 5
    del regions._reads["linear"][3:]
    assert len(regions._reads["linear"]) == 3 and regions.totals_ms()["outer"] > 0


def test_the_kv_pool_is_no_larger_than_needed() -> None:
    sizes = engine.EngineSizes(max_model_len=1501, num_tokens=1501, chunk_len=512)
    memory = engine.plan_engine(tiny_shape(), "cpu", sizes).memory
    assert memory.num_blocks == 12 and memory.max_model_len == 1501
    with pytest.raises(NotEnoughMemoryError, match="needs"):
        engine.plan_engine(tiny_shape(), "cpu", engine.EngineSizes(
            max_model_len=1501, num_tokens=1501, memory_gib=1e-3))


def test_shapes_by_name_are_real() -> None:
    from longspan.bench.shapes import PlanOptions, Shape

    seven = Shape.make("qwen2.5-7b")
    assert seven.model.num_parameters == 7_615_616_512  # as the released checkpoint has
    assert Shape.make("qwen2.5-14b").model.num_parameters == 14_770_033_664
    assert seven.plan_label == "releasedx0.5-tile-correction-scouts128"
    means = [sum(map(sum, rows)) / 784 for rows in (seven.plan.vertical, seven.plan.slash)]
    assert [round(mean) for mean in means] == [3920, 7650]
    flat = Shape.make("qwen2.5-14b", PlanOptions(
        vertical=1000, slash=4096,
        policy="mean_correction=0,num_scouts=0,tail_len=0"))
    assert flat.plan_label == "v1000-s4096-tile-owntail0" and flat.plan.slash[47] == (4096,) * 40
    half = Shape.make("qwen2.5-7b", PlanOptions(policy="budget_share=0.25,num_scouts=128"))
    assert half.plan_label.startswith("releasedx0.25-") and half.plan.num_scouts == 128
    paper = Shape.make("qwen2.5-7b", PlanOptions(mode="paper"))
    assert paper.plan_label == "released-paper" and paper.plan.sink == 30
    assert Shape.make("nano").model.num_layers == 6
    assert seven.cut(4).model.num_layers == len(seven.cut(4).plan.slash) == 4
    for name, options, message in (
        ("x", None, "there are"), ("nano", PlanOptions(vertical=3), "both or neither"),
        ("nano", PlanOptions(mode="y"), "tile or paper"),
        ("nano", PlanOptions(policy="scouts=3"), "with one of vertical"),
        ("nano", PlanOptions(policy="num_scouts=x"), "no number"),
        ("nano", PlanOptions(policy="num_scouts=-1"), "num_scouts is -1")):
        with pytest.raises(LongspanError, match=message):
            Shape.make(name, options)
    with pytest.raises(LongspanError, match="has 28 layers"):
        seven.cut(29)


def test_decode_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = DecodeOptions(contexts=(1000, 300), batches=(1, 3), layers=None, steps=3,
                            memory_gib=None, rows=(4, 1), copy_bytes=4096)
    assert decode.run(session("decode", tmp_path), tiny_shape(), options) == 0
    found = [row for row in rows_of(tmp_path, "decode") if row["shape"] == "tiny"]
    few = [row for row in found if "rows" in row]
    rows = [row for row in found if "rows" not in row]
    assert {(row["context_len"], row["rows"]) for row in few} == {
        (300, 1), (300, 4), (1000, 1), (1000, 4)}
    for row in few:
        assert row["attention_ms"] > 0 and row["over_one_row"] > 0
        assert row["rows"] > 1 or row["over_one_row"] == 1
    assert {(row["context_len"], row["batch_size"]) for row in rows} == {
        (1000, 1), (1000, 3), (300, 1), (300, 3)}
    for row in rows:
        assert row["step_ms"] > 0 and row["floor_ms"] > 0 and row["kv_tb_per_s"] > 0
        assert row["over_floor"] == pytest.approx(row["step_ms"] / row["floor_ms"], rel=1e-3)
    assert "over floor" in capsys.readouterr().out


def test_contexts_that_do_not_fit_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = tiny_shape()
    small = engine.plan_engine(shape, "cpu", decode._sizes(
        DecodeOptions(contexts=(), batches=(), layers=None, steps=1, memory_gib=None), 300, 1,
        [(300, 1)])).memory.needed_bytes
    options = DecodeOptions(contexts=(300, 2_000_000), batches=(1,), layers=None, steps=2,
                            memory_gib=1.05 * small / 1024**3, copy_bytes=4096)
    assert decode.run(session("decode", tmp_path), shape, options) == 0
    rows = {row["context_len"]: row for row in rows_of(tmp_path, "decode")}
    assert rows[300]["step_ms"] > 0 and "needs" in rows[2_000_000]["error"]


def test_the_floor_counts_what_is_read() -> None:
    shape = tiny_shape()
    model = shape.model
    embedding = model.vocab_size * model.hidden_size
    assert engine.weight_bytes_read(shape, "cpu", 1) == 4 * (model.num_parameters - embedding)
    assert engine.weight_bytes_read(shape, "cuda", 9) == 2 * (model.num_parameters - embedding)


def test_decode_reads_the_experts_that_tokens_take() -> None:
    from longspan.bench.shapes import Shape

    shape = Shape.make("qwen3-30b-a3b")
    one, many, all_of_them = (engine.weight_bytes_read(shape, "cuda", n) for n in (1, 64, 10_000))
    head = shape.model.vocab_size * shape.model.hidden_size
    vectors = 48 * (2 * 2048 + 2 * 128) + 2048
    assert one == pytest.approx(2 * (shape.model.num_active_parameters + head + vectors), rel=1e-9)
    assert all_of_them == 2 * (shape.model.num_parameters - head)
    assert 0.98 < many / all_of_them < 0.99


def test_attention_by_name() -> None:
    with pytest.raises(LongspanError, match="--attention: 'auto'"):
        ttft_options(attention=("auto",))


@pytest.mark.gpu
def test_a_real_shape_runs_on_a_gpu(tmp_path: Path) -> None:
    from longspan.bench.shapes import Shape

    options = ttft_options(lengths=(9000,), layers=2, chunk_len=4096)
    bench = BenchSession("ttft", BenchOptions(device="cuda", out=tmp_path))
    assert ttft.run(bench, Shape.make("qwen2.5-7b"), options) == 0
    assert torch.cuda.is_available() and len(bench.rows) == 2
