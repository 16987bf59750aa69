"""`longspan bench ops` on the CPU with a tiny shape: rows, ratios, and ops that are wrong."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan import ops
from longspan.bench.ops import checks
from longspan.bench.ops.baselines import Plain, causal_blocks, prepare
from longspan.bench.ops.command import run
from longspan.bench.ops.dense import SECTIONS, OpsOptions
from longspan.bench.ops.inputs import CONTENTS, last_segment, make_input, make_rotary
from longspan.bench.ops.sparse import dense_sum, spread, typical_layer
from longspan.bench.ops.tiles import causal_flops, count_tiles
from longspan.bench.session import BenchOptions, BenchSession, CheckFailed, Unavailable
from longspan.bench.timing import Repeats
from longspan.commands import results
from longspan.errors import LongspanError
from longspan.expert_config import ExpertConfig
from longspan.ops.types import Selection
from tests.bench.shapes_for_tests import tiny_shape
from tests.conftest import assert_close

ONCE = Repeats(max_s=0.01, most=1)


def options(**values: Any) -> OpsOptions:
    defaults: dict[str, Any] = {
        "lengths": (512, 2048), "square": (600,), "baselines": ("math", "cudnn", "flex"),
        "chunk_baselines": ("math", "cudnn"), "flex_max": 512, "chunk_len": 512, "layers": 2,
        "sections": SECTIONS, "contents": CONTENTS, "repeats": ONCE, "gemm_size": 64,
        "copy_bytes": 4096, "expert_tokens": (40,), "expert_batches": (1, 3),
        "linear_rows": (24,), "few_rows": (1, 3)}
    return OpsOptions(**{**defaults, **values})


def session(folder: Path, **values: Any) -> BenchSession:
    return BenchSession("ops", BenchOptions(device="cpu", out=folder, commit="abc", **values))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ops")
    shape = tiny_shape()
    experts = ExpertConfig(num_experts=6, num_chosen=2, expert_size=24)
    shape = replace(shape, model=replace(shape.model, experts=experts))
    assert run(session(folder), shape, options()) == 0
    (content,) = results.read_bench(folder, "ops")
    assert content["commit"] == "abc"
    rows: list[dict[str, Any]] = content["rows"]
    return rows


def chosen(rows: list[dict[str, Any]], op: str, impl: str = "ours") -> list[dict[str, Any]]:
    return [row for row in rows if (row["op"], row["impl"]) == (op, impl)]


def test_every_section_has_rows(measured: list[dict[str, Any]]) -> None:
    found = {(row["op"], row["impl"]) for row in measured if "error" not in row}
    assert found == {
        ("copy", "torch"), ("gemm", "torch"), ("dense_causal", "ours"), ("dense_causal", "math"),
        ("dense_chunk", "ours"), ("dense_chunk", "math"), ("select", "ours"),
        ("sparse_chunk", "ours"), ("decode", "ours"), ("decode", "math"),
        ("dense_chunk_dca_over_rope", "ours"), ("sparse_chunk_dca_over_rope", "ours"),
        ("whole_dense", "ours"), ("whole_dense", "math"), ("whole_sparse", "ours"),
        ("rms_norm", "ours"), ("add_rms_norm", "ours"), ("silu_mul", "ours"), ("store_kv", "ours"),
        ("experts", "ours"), ("read", "torch"), ("experts_decode", "ours"),
        *((op, "fp8-rows") for op in ("experts", "experts_decode")),
        *((op, kind) for op in ("linear", "linear_few")
          for kind in ("plain", "fp8-rows", "fp8-blocks", "int4"))}
    assert all(row["time_ms"] > 0 and row["n"] >= 1 for row in measured
               if "error" not in row and row["op"] != "whole_dense")
    assert {row["error"] for row in measured if "error" in row} == {
        "cudnn needs a CUDA GPU", "triton needs a CUDA GPU", "grouped_mm needs a CUDA GPU",
        "activations are not rounded here"}


def test_rows_of_products_say_what_they_lose(measured: list[dict[str, Any]]) -> None:
    for kind in ("plain", "fp8-rows", "int4"):
        many, few = chosen(measured, "linear", kind), chosen(measured, "linear_few", kind)
        assert {row["params"]["product"] for row in many} == {
            row["params"]["product"] for row in few} <= {
            "qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
        assert all(row["tflops"] > 0 and row["rel_error"] <= 1e-5 for row in many)
        assert {row["params"]["num_tokens"] for row in few} == {1, 3}
        assert all(row["tb_per_s"] > 0 for row in few)


def test_rows_of_experts_say_what_was_read(measured: list[dict[str, Any]]) -> None:
    (prefill,), decodes = chosen(measured, "experts"), chosen(measured, "experts_decode")
    assert prefill["params"]["num_tokens"] == 40 and prefill["tflops"] > 0
    assert [row["params"]["num_tokens"] for row in decodes] == [1, 3]
    assert decodes[0]["experts_read"] == 2 and 2 <= decodes[1]["experts_read"] <= 6
    assert all(row["ratio"] > 0 and row["rel_error"] <= 1e-5 for row in decodes)


def test_a_shape_without_experts_is_not_measured_on_a_cpu(tmp_path: Path) -> None:
    assert run(session(tmp_path), tiny_shape(), options(sections=("experts",))) == 0
    assert not results.read_bench(tmp_path, "ops") or not results.read_bench(
        tmp_path, "ops")[0]["rows"]


def test_sparse_rows_say_what_was_computed(measured: list[dict[str, Any]]) -> None:
    rows = chosen(measured, "sparse_chunk")
    assert {row["params"]["content"] for row in rows} == set(CONTENTS)
    assert {(row["params"]["context_len"], row["params"]["num_queries"]) for row in rows} == {
        (512, 512), (2048, 512)}
    for row in rows:
        assert 0 < row["density"] <= 1 and row["rel_error"] <= 1e-5 and row["tflops"] > 0
        # whole tiles hold the pairs that count
        assert row["computed_share"] >= row["density"]
    whole = chosen(measured, "whole_sparse")
    assert {row["params"]["num_tokens"] for row in whole} == {512, 2048}
    for row in whole:
        parts = row["selection_ms"] + row["attention_ms"] + row["dense_ms"]
        assert row["time_ms"] > 0 and parts > 0 and row["layers_measured"] == [0, 2]
        assert row["ratio"] > 0 and row["dense_impl"] in ("ours", "math")


def test_a_wrong_op_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.prefill_attention

    def wrong(*args: Any) -> Any:
        out, lse = right(*args)
        out[0, 0] += 1
        return out, lse
    monkeypatch.setattr(ops, "prefill_attention", wrong)
    assert run(session(tmp_path), tiny_shape(), options(sections=("dense",))) == 1
    rows = results.read_bench(tmp_path, "ops")[0]["rows"]
    (ours,) = chosen(rows, "dense_causal")
    assert "prefill_attention out is wrong" in ours["error"] and "time_ms" not in ours
    assert chosen(rows, "dense_causal", "math")[0]["time_ms"] > 0
    assert "not timed" in capsys.readouterr().err


def broken_sparse(*args: Any) -> Any:
    q = args[0]
    return torch.zeros_like(q), q.new_zeros(q.shape[:2]), torch.zeros(())


def first_columns(*args: Any) -> Selection:
    q, budget = args[0], args[-1]
    columns = torch.arange(max(budget.vertical)).expand(q.shape[1], -1)
    return Selection(columns, torch.zeros(q.shape[1], 1, dtype=torch.int64), 128, True)


@pytest.mark.parametrize(("name", "replacement", "message"), [
    ("sparse_prefill_attention", broken_sparse, "sparse_prefill_attention out is wrong"),
    ("select_vertical_slash", first_columns, "of a head's attention mass"),
    ("decode_attention", lambda q, *_: (q, q[..., 0]), "decode_attention out is wrong"),
])
def test_each_op_is_checked(
    name: str, replacement: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, name, replacement)
    shape = tiny_shape()
    with pytest.raises(CheckFailed, match=message):
        checks.check_decode(shape, "cpu")
        checks.check_sparse(shape, "cpu", shape.plan.layer(0), True)


def test_rows_of_the_timed_input_are_checked() -> None:
    shape = tiny_shape()
    item = make_input(shape, 700, "random", "cpu")
    q = item.make_queries(500, 200)
    out, lse = ops.prefill_attention(q, item.cache, item.block_table, 500, item.rotary, item.scale)
    assert checks.check_rows("dense", (out, lse), q, item, 500) < 1e-5
    with pytest.raises(CheckFailed, match="dense .LSE of the timed input. is wrong"):
        checks.check_rows("dense", (out, lse + 1), q, item, 500)
    out[-1] = math.nan
    with pytest.raises(CheckFailed, match="error ratio inf"):
        checks.check_rows("dense", (out, lse), q, item, 500)


@pytest.mark.parametrize(("columns", "offsets", "message"), [
    ([[1, 1, -1]], [[0, -128]], "do not ascend"), ([[3, -1, 5]], [[0]], "do not ascend"),
    ([[2, 700]], [[0]], "behind the context"), ([[2]], [[0, -64]], "overlap"),
    ([[2]], [[-128, -256]], "whole tiles"),
])
def test_unsound_selections(columns: Any, offsets: Any, message: str) -> None:
    selection = Selection(torch.tensor(columns), torch.tensor(offsets), 128, True)
    with pytest.raises(CheckFailed, match=message):
        checks.check_sound(selection, 700, 1)


@pytest.mark.parametrize("tiles", [[1, 0], [-1, 1], [2, 3], [4, -1], [6, -1]])
def test_unsound_lists_of_tiles(tiles: list[int]) -> None:
    """Query tiles 4 and 5, whose own and nearest tiles are windows."""
    selection = Selection(torch.tensor([[2]]), torch.tensor([[0, -128, 128]]), 128, True)
    lists = torch.tensor([[[0, 2], [-1, -1]]], dtype=torch.int32)
    checks.check_sound(selection._replace(tiles=lists, first_tile=4), 700, 1)
    lists[0, 0] = torch.tensor(tiles)
    with pytest.raises(CheckFailed, match="listed tiles of head 0"):
        checks.check_sound(selection._replace(tiles=lists, first_tile=4), 700, 1)


def test_the_budget_ends_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(session(tmp_path, budget_s=1e-9), tiny_shape(), options()) == 0
    assert "budget" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_tiles_are_counted_from_the_selection() -> None:
    # queries 256..511 are tiles 2 and 3; windows at gaps 0, 1 and 3; columns 5, 200 and 400
    selection = Selection(torch.tensor([[5, 200, 400, -1]]), torch.tensor([[0, -128, -384, 128]]),
                          128, True)
    windows = 2 + 3  # gap 3 exists for tile 3 only
    columns = 1 + 1
    assert count_tiles(selection, 256, 256, correction=False) == windows + columns
    assert count_tiles(selection, 256, 256, correction=True) == windows + columns + 2
    lists = torch.tensor([[[9, 9], [-1, -1], [0, -1], [0, 1]]], dtype=torch.int32)
    listed = selection._replace(tiles=lists)
    assert count_tiles(listed, 256, 256, correction=False) == windows + columns + 3
    assert causal_flops(2, 3, 1, 1) == 4 * (4 + 5)


def test_dense_sums_follow_the_measured_line() -> None:
    curve = {0: 1.0, 400: 5.0, 800: 13.0}
    assert dense_sum(curve, 1000, 200)["time_ms"] == 1 + 3 + 5 + 9 + 13
    assert dense_sum(curve, 300, 200)["time_ms"] == 1 + 3 / 2


def test_layers_are_spread() -> None:
    assert spread(28, 4) == [3, 10, 17, 24] and spread(3, 9) == [0, 1, 2] and spread(5, 1) == [2]
    assert typical_layer([[1], [5], [9]], [[0], [0], [0]]) == 1


@pytest.mark.parametrize(("length", "stride", "expected"), [
    (1000, 512, (512, 384)), (2048, 512, (1664, 384)), (512, 5000, (128, 384)),
    (1152, 512, (768, 256)), (200, 512, (0, 128))])
def test_last_segment(length: int, stride: int, expected: tuple[int, int]) -> None:
    start, count = last_segment(length, 384, stride)
    assert start // stride == (start + count - 1) // stride and start % 128 == 0 == count % 128
    assert (start, count) == expected


@pytest.mark.parametrize("content", CONTENTS)
def test_contents_are_what_they_are_called(content: str) -> None:
    shape = tiny_shape()
    item = make_input(shape, 2048, content, "cpu", rotary=make_rotary(shape, 2048, "cpu", None))
    q = item.make_queries(1792, 256)
    keys = item.cache.k[item.block_table].flatten(0, 1)[:2048, 0]
    rotated = ops.rotate(q[:, :1], item.rotary.cos[1792:2048], item.rotary.sin[1792:2048])[:, 0]
    scores = (rotated @ keys.T / 4).tril(1792)
    near = torch.stack([row[i + 1792 - 100: i + 1792].mean() for i, row in enumerate(scores)])
    if content == "random":
        assert abs(near.mean()) < 0.2 and scores.max() < 8
    if content == "local":
        assert near.mean() > 0.5
    if content == "scattered":
        means = torch.stack([scores.diagonal(1792 - gap).mean() for gap in range(1792)])
        assert means.max() > 1 and 4 < (means > 0.6).sum() < 64


@pytest.mark.parametrize("history", [0, 256])
def test_baselines_compute_causal_attention(history: int) -> None:
    q, k = torch.randn(128, 4, 16), torch.randn(128 + history, 2, 16)
    plain = Plain.of(q, k, k)
    outs = prepare("math", plain)()
    mask = torch.ones(128, 128 + history, dtype=torch.bool).tril(history)
    if not history:
        expected = torch.nn.functional.scaled_dot_product_attention(
            plain.q, plain.k, plain.v, attn_mask=mask, enable_gqa=True)
        assert_close(outs[0], expected)
        checks.check_plain("math", outs, plain)
        with pytest.raises(CheckFailed):
            checks.check_plain("math", [outs[0] * 1.1], plain)
    assert len(outs) == 1 + bool(history)
    dense = causal_blocks(128, history, torch.device("cpu")).to_dense()
    assert dense.shape[-1] == 1 + history // 128 and dense.all()


@pytest.mark.parametrize("name", ["cudnn", "fa2", "flex", "other"])
def test_missing_baselines_are_named(name: str) -> None:
    plain = Plain.of(*(torch.randn(128, 2, 16) for _ in range(3)))
    with pytest.raises(Unavailable, match=name):
        prepare(name, plain)


@pytest.mark.parametrize(("changes", "message"), [
    ({"sections": ("x",)}, "--only: 'x'"), ({"contents": ("y",)}, "--contents: 'y'"),
    ({"chunk_len": 100}, "--chunk-len 100"), ({"chunk_len": 4096}, "--chunk-len 4096")])
def test_wrong_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LongspanError, match=message):
        options(**changes)


def test_rows_are_json(measured: list[dict[str, Any]]) -> None:
    assert json.loads(json.dumps(measured)) == measured
