"""SparsityPlan: our file and the released format, the paper's policy, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan.attention.sparsity import SCHEMA_VERSION, SparsityPlan
from longspan.errors import CheckpointError, LongspanError

# The released format with entries of each kind; {head: [type, vertical, slash, score]}
EXCERPT: list[dict[str, Any]] = [
    {"0": ["vertical_and_slash", 9192, 14288, 0.6920984983444214],
     "1": ["vertical_and_slash", 1000, 6096, 0.9862403869628906],
     "2": ["vertical_and_slash", 3048, 8144, 0.8198256492614746]},
    {"2": ["vertical_and_slash", 3500, 100, 0.95],  # order of keys does not matter
     "0": ["vertical_and_slash", 30, 800, 0.9972315430641174],
     "1": ["vertical_and_slash", 500, 700, 0.9]},
]
TEST_DATA = Path(__file__).parents[1] / "data"
EXCERPT_FILE = TEST_DATA / "qwen2.5-7b-instruct-1m.layers-0-4.sparsity.json"
RELEASED_FILES = Path(__file__).parents[3] / "shared" / "data"


def make_plan(**changes: Any) -> SparsityPlan:
    values: dict[str, Any] = {
        "vertical": ((30, 1000), (30, 31)), "slash": ((800, 4096), (100, 7)),
        "provenance": {"model": "nano", "recall": 0.95, "date": "2026-11-23"}}
    return SparsityPlan(**values | changes)


@pytest.mark.parametrize("plan", [
    make_plan(), make_plan().paper(), SparsityPlan.default(3, 5),
    make_plan(probe_last=17, probe_strided=0, sink=0, local=1, tail_len=0, num_scouts=7,
              scout_threshold=-0.5, scout_tiles=9, mean_correction=False)],
    ids=["full", "paper", "default", "all-fields"])
def test_save_and_load_roundtrip(plan: SparsityPlan, tmp_path: Path) -> None:
    file = tmp_path / "sparsity.json"
    plan.save(file)
    assert SparsityPlan.load(file) == plan
    assert json.loads(file.read_text())["schema_version"] == SCHEMA_VERSION


def test_default_is_the_same_for_every_head() -> None:
    plan = SparsityPlan.default(3, 5, vertical=7, slash=256)
    assert plan.vertical == ((7,) * 5,) * 3 and plan.slash == ((256,) * 5,) * 3
    assert plan.mode == "tile" and plan.mean_correction and plan.tail_len == 1024
    budget = plan.layer(0)
    assert (budget.num_scouts, budget.scout_threshold, budget.scout_tiles) == (128, -3.0, 128)
    assert (budget.most_scouts, budget.near_len) == (4096, 16_384)
    assert replace(plan, mean_correction=False).layer(0).near_len is None


def test_released_format_keeps_budgets_and_takes_our_policy(tmp_path: Path) -> None:
    """Read in the order of head numbers, from a list or from a file."""
    plan = SparsityPlan.from_released(EXCERPT)
    assert plan.vertical == ((9192, 1000, 3048), (30, 500, 3500))
    assert plan.slash == ((14288, 6096, 8144), (800, 700, 100))
    assert plan.mode == "tile" and plan.mean_correction
    assert plan.layer(1).vertical == (15, 250, 1750)  # half of each is bought
    file = tmp_path / "sparse_attention_config.json"
    file.write_text(json.dumps(EXCERPT))
    assert SparsityPlan.load(file) == plan


def test_released_probe_length_is_kept() -> None:
    assert SparsityPlan.from_released(EXCERPT, probe_last=32).layer(0).probe_last == 32


def test_paper_mode_is_minference_policy() -> None:
    """30 sinks and 100 diagonals forced; a vertical budget of exactly 30 becomes 130."""
    plan = SparsityPlan.from_released(EXCERPT, mode="paper")
    assert plan.vertical == ((9192, 1000, 3048), (130, 500, 3500))
    assert plan.slash == ((14288, 6096, 8144), (800, 700, 100))
    budget = plan.layer(1)
    assert (budget.mode, budget.sink, budget.local) == ("paper", 30, 100)
    assert (budget.probe_last, budget.probe_strided) == (64, 0)
    assert not plan.mean_correction and plan.tail_len == 0 == budget.num_scouts
    assert budget.vertical == (130, 500, 3500)
    assert make_plan().paper().vertical == ((130, 1000), (130, 31))
    assert make_plan(vertical=((29, 0), (30, 31))).paper().vertical == ((29, 0), (130, 31))


def test_layer_gives_the_budgets_of_that_layer() -> None:
    plan = make_plan(sink=3, local=9)
    assert plan.layer(0).vertical == (30, 1000) and plan.layer(1).vertical == (30, 31)
    assert plan.layer(0).slash == (800, 4096) and plan.layer(1).slash == (100, 7)
    assert (plan.layer(1).sink, plan.layer(1).local, plan.layer(1).mode) == (3, 9, "tile")


def test_fits_only_its_own_shape() -> None:
    make_plan().check_fits(2, 2)
    for shape in ((3, 2), (2, 3), (2, 28)):
        with pytest.raises(LongspanError, match="2 layers of 2 heads") as caught:
            make_plan().check_fits(*shape)
        assert "calibrate a plan" in str(caught.value)
    ragged = SparsityPlan(vertical=((1, 2), (3,)), slash=((1, 2), (3,)))
    with pytest.raises(LongspanError):
        ragged.check_fits(2, 2)
    with pytest.raises(LongspanError):
        SparsityPlan(vertical=(), slash=()).check_fits(2, 2)


@pytest.mark.parametrize(("changes", "message"), [
    ({"mode": "flex"}, "mode 'flex'"),
    ({"slash": ((1,), (2, 3))}, "differ in layers or heads"),
    ({"slash": ((1, 2),)}, "differ in layers or heads"),
    ({"vertical": ((30, -1), (30, 31))}, "must not be negative"),
    ({"slash": ((100, 2**31), (100, 200))}, "must not be negative or above 2147483647"),
    ({"probe_last": 0}, "probe_last is 0"),
    ({"probe_last": True}, "probe_last is True"),
    ({"local": 2**31}, "local is 2147483648"),
    ({"mean_correction": "no"}, "mean_correction is 'no'"),
    ({"probe_strided": -1}, "probe_strided is -1"),
    ({"sink": "4"}, "sink is '4'"),
    ({"local": 1.5}, "local is 1.5"),
    ({"tail_len": -5}, "tail_len is -5"),
    ({"num_scouts": -1}, "num_scouts is -1"),
    ({"scout_tiles": 0}, "scout_tiles is 0"),
    ({"scout_threshold": "0"}, "scout_threshold is '0'"),
    ({"scout_threshold": float("nan")}, "scout_threshold is nan"),
    ({"mode": "paper"}, "mean_correction"),
    ({"mode": "paper", "mean_correction": False}, "num_scouts"),
], ids=lambda value: value.split(" is")[0] if isinstance(value, str) else "")
def test_refused_plans(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LongspanError, match=message):
        make_plan(**changes)


def file_content(**changes: Any) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "vertical": [[30, 5]], "slash": [[100, 7]], **changes}


REFUSED_FILES: dict[str, tuple[Any, str]] = {
    "not-json": ("{", "not valid JSON"),
    "string": ('"text"', "JSON object"),
    "number": ("7", "JSON object"),
    "newer-schema": (file_content(schema_version=4), "schema_version 4"),
    "no-schema": ({"vertical": [[1]], "slash": [[1]]}, "schema_version None"),
    "unknown-fields": (file_content(verticals=[], a=1), "unknown fields a, verticals"),
    "text-budget": (file_content(vertical=[["x", 5]]), "vertical"),
    "fraction-budget": (file_content(slash=[[1.5, 5]]), "slash"),
    "flat-budget": (file_content(vertical=[30, 5]), "vertical"),
    "no-budget": ({"schema_version": 1, "vertical": [[30]]}, "slash"),
    "bad-policy": (file_content(sink=-1), "sink is -1"),
    "no-share": (file_content(budget_share=0), "budget_share is 0"),
    "large-share": (file_content(budget_share=1.5), "budget_share is 1.5"),
    "stream-llm": ([{"0": ["stream_llm", 100, 800, 0.9]}], "layer 0 head 0 has type 'stream_llm'"),
    "missing-head": ([{"0": ["vertical_and_slash", 1, 1, 0.9],
                       "2": ["vertical_and_slash", 1, 1, 0.9]}], "none for head 1"),
    "short-entry": ([{"0": ["vertical_and_slash", 100]}], "layer 0 head 0"),
    "endless-entry": ('[{"0": ["vertical_and_slash", 1e400, 100, 0.9]}]', "layer 0 head 0"),
    "text-entry": ([{"0": ["vertical_and_slash", "many", 100, 0.9]}], "layer 0 head 0"),
    "layer-is-no-object": ([["vertical_and_slash", 1, 1, 0.9]], "layer 0"),
}


@pytest.mark.parametrize(("version", "num_scouts"), [(1, 0), (SCHEMA_VERSION, 128)])
def test_plans_from_before_scouts_have_none(version: int, num_scouts: int, tmp_path: Path) -> None:
    """Their budgets were measured so; released ones carry no policy and take ours."""
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(file_content(schema_version=version)))
    assert SparsityPlan.load(file).layer(0).num_scouts == num_scouts


@pytest.mark.parametrize("version", [1, 2])
def test_what_was_a_dense_tail_is_the_tail(version: int, tmp_path: Path) -> None:
    """At the same place; a plan of today that says so is refused."""
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(file_content(schema_version=version, dense_tail_len=77)))
    assert SparsityPlan.load(file).tail_len == 77
    file.write_text(json.dumps(file_content(dense_tail_len=77)))
    with pytest.raises(CheckpointError, match="unknown fields dense_tail_len"):
        SparsityPlan.load(file)


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_refused_files(name: str, tmp_path: Path) -> None:
    """One line that names the file and what is wrong with it."""
    content, message = REFUSED_FILES[name]
    file = tmp_path / "plan.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError, match=message) as caught:
        SparsityPlan.load(file)
    assert "plan.json" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such sparsity plan; leave it out"):
        SparsityPlan.load(tmp_path / "absent.json")


def released_files() -> list[Any]:
    """Layers 0 and 4 for the 7B model as released (MInference repository, MIT licence), and the
    whole files where they stand beside the repository."""
    shapes = {"qwen2.5-7b-instruct-1m": (28, 28), "qwen2.5-14b-instruct-1m": (48, 40)}
    files = [(RELEASED_FILES / f"{name}.sparsity.json", *shape) for name, shape in shapes.items()]
    found = [(EXCERPT_FILE, 2, 28), *(item for item in files if item[0].is_file())]
    return [pytest.param(*item, id=item[0].name.removesuffix(".sparsity.json")) for item in found]


@pytest.mark.parametrize(("file", "num_layers", "num_heads"), released_files())
def test_released_files(file: Path, num_layers: int, num_heads: int) -> None:
    plan = SparsityPlan.load(file)
    plan.check_fits(num_layers, num_heads)
    pairs = Counter((v, s) for rows in zip(plan.vertical, plan.slash, strict=True)
                    for v, s in zip(*rows, strict=True))
    assert pairs.total() == num_layers * num_heads
    assert pairs.most_common(1)[0][0] == (1000, 6096)
    raised = Counter(v for row in plan.paper().vertical for v in row)
    assert raised[130] == pairs[30, 800] > 0 and raised[30] == 0
