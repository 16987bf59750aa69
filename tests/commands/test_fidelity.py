"""`longspan eval fidelity` on nano, short texts, and what people get wrong."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from longspan import cli
from longspan.attention.head_errors import HeadErrors
from longspan.attention.sparsity import SparsityPlan
from longspan.commands import fidelity, results
from longspan.commands.fidelity import LogitWatch
from longspan.engine.front.llm import LLM
from longspan.engine.request import SamplingParams
from longspan.errors import LongspanError
from longspan.model.weights import resolve_checkpoint

Capture = pytest.CaptureFixture[str]
JSON = str(Path(sysconfig.get_paths()["stdlib"]) / "json")


def run(*arguments: object) -> int:
    return cli.run_command(["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def small_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano's plan with budgets that leave much out of a short text."""
    plan = SparsityPlan.load(resolve_checkpoint("nano") / "sparsity_plan.json")
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    raw = json.loads((resolve_checkpoint("nano") / "sparsity_plan.json").read_text())
    few = [[32] * len(row) for row in plan.vertical]
    raw.update(vertical=few, slash=[[128] * len(row) for row in plan.slash], tail_len=128)
    file.write_text(json.dumps(raw))
    return file


def test_sparse_against_dense_and_its_floor(
    small_plan: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert run("fidelity", "nano", "--task", "vt,perplexity", "--lengths", "1400", "-n", 1,
               "--attention", "sparse,paper", "--positions", "dca", "--sparsity-plan", small_plan,
               "--prefill-chunk-len", 512, "--compared-positions", 200, "--every", 2,
               "--kv-dtype", "int8", "--device",
               "cpu", "--threads", 1, "--text-root", JSON, "--out", tmp_path) == 0
    (content,) = results.read_bench(tmp_path, "fidelity")
    rows = {(row["attention"], row["task"]): row for row in content["rows"]}
    arms = "dca floor", "dca int8 KV", "plan-dca", "paper-plan-dca"
    assert set(rows) == {(arm, task) for arm in arms for task in ("vt", "perplexity", "all")}
    floor, int8, sparse, paper = (rows[arm, "all"] for arm in arms)
    assert 10 * abs(floor["kl"]) < int8["kl"] < 0.003 and int8["density"] == 1
    assert abs(floor["kl"]) < 1e-6 and floor["top1"] > 0.99 and floor["density"] == 1
    assert "recall" not in floor
    for row in (sparse, paper):
        assert row["kl"] > 1000 * abs(floor["kl"]) and row["density"] < 0.7
        assert row["worst_task"]["kl"] == max(
            rows[row["attention"], task]["kl"] for task in ("vt", "perplexity"))
        heads = np.array(row["recall_by_head"])
        assert heads.shape == (6, 4) and (heads > 0).all() and (heads <= 1.0001).all()
        assert row["worst_head"]["recall"] == pytest.approx(heads.min(), abs=1e-3)
        assert row["num_positions"] <= 2 * 200 and row["n"] == 2
        assert row["nats"] == pytest.approx(floor["nats"] + row["nats_more"], abs=1e-3)
    assert rows["plan-dca", "vt"]["num_answer_tokens"] > 0
    assert run("plot", next(tmp_path.glob("*.json")), "--out", tmp_path / "plots") == 0
    assert len(list((tmp_path / "plots").glob("*.heads.svg"))) == 2
    said = capsys.readouterr()
    assert "the worst" in said.out and "plan-dca beside dense, 1,400 tokens" in said.out
    (tmp_path / "other.json").write_text('{"bench": "cpu", "rows": []}')
    assert run("plot", tmp_path / "other.json") == 2


def test_what_is_watched_is_what_is_computed(small_plan: Path) -> None:
    """Logits that go by are those that the log-probabilities come from; a sample of query tiles
    shows what those tiles show."""
    ids = (torch.randint(5, 4000, (1400,))).tolist()
    with LLM("nano", device="cpu", attention="sparse", sparsity_plan=str(small_plan),
             prefill_chunk_len=512, num_threads=1) as llm:
        whole, some = (HeadErrors(every=every, with_errors=True) for every in (1, 3))
        watch = LogitWatch(np.arange(1, 1400), None)
        llm.observe(whole)
        llm.watch_logits(watch)
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        (output,) = llm.generate([ids], params)
        llm.observe(some)
        llm.watch_logits(None)
        llm.generate([ids], params)
    logprobs = torch.cat(watch.logprobs)
    assert logprobs.shape == (1399, 4096)
    own = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    np.testing.assert_allclose(own.numpy(), output.prompt_logprobs[1:], atol=1e-5)
    assert len(whole.recalls()) == len(some.recalls()) == 6, "the last layer computes all rows"
    tiles = [sum(map(len, seen._recalls[0])) for seen in (whole, some)]
    assert 0 < tiles[1] < tiles[0] / 2
    for layer, parts in some._recalls.items():
        every = torch.cat(whole._recalls[layer])
        for row in torch.cat(parts)[::37]:
            assert torch.isclose(every, row, rtol=1e-4, atol=1e-6).all(1).any()
    errors = torch.cat(whole._errors[0])
    assert (errors >= 0).all() and errors.mean() > 1e-4


@pytest.mark.parametrize(("more", "message"), [
    (["--attention", "dense"], "dense is what all are compared with"),
    (["--attention", "x"], "--attention: 'x' is not one of"),
    (["--positions", "alibi"], "--positions: 'alibi'"),
    (["--compared-positions", "1"], "at least 2 positions"),
    (["--every", "0"], "one tile of 0"),
    (["--lengths", "2m"], "2,097,152 tokens are more than the model's limit of 1,010,000"),
    (["--lengths", "300"], "too short"),
    (["--task", "nedle"], "no task is called 'nedle'"),
    (["--sparsity-plan", "/no/plan.json"], "no such sparsity plan"),
    (["--time-limit-s", "0"], "the time limit came before one text was compared"),
])
def test_wrong_options(tmp_path: Path, capsys: Capture, more: list[str], message: str) -> None:
    lengths = [] if "--lengths" in more else ["--lengths", "1500"]
    assert run("fidelity", "nano", "--task", "vt", *lengths, "-n", 1, "--device", "cpu",
               "--text-root", JSON, "--out", tmp_path, *more) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_too_many_distributions(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nothing:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Nothing)
    texts: list[Any] = [fidelity.Text("vt", 9, 0, None, 0, np.arange(5))]  # type: ignore[arg-type]
    with pytest.raises(LongspanError, match="compare fewer --compared-positions"):
        fidelity._check_memory(texts, 4096)
