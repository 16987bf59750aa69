"""`longspan calibrate` on a tiny checkpoint: the plan, its provenance, interruptions, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan import cli, ops
from longspan.attention.observer import AttendedRows, AttentionObserver
from longspan.attention.sparsity import SparsityPlan
from longspan.commands import calibrate as command
from longspan.commands.console import PrefillBar
from longspan.engine.front.llm import LLM
from longspan.engine.request import Progress
from tests.doubles import write_checkpoint

Capture = pytest.CaptureFixture[str]
LENGTH = 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(3):
        (folder / f"{number}.md").write_text("".join(
            f"Line {index} of text {number} says {index * index % 97}.\n" for index in range(60)))
    return folder


def arguments(model: Path, folder: Path, out: Path, **changes: Any) -> list[str]:
    options = {"length": LENGTH, "recall": 0.9, "text-root": folder, "prefill-chunk-len": 512,
               "device": "cpu", "out": out} | changes
    return ["calibrate", str(model), *(f"--{name}={value}" for name, value in options.items())]


def test_the_plan_says_what_it_was_made_of_and_keeps_what_it_says(
    model: Path, texts: Path, tmp_path: Path, capsys: Capture,
) -> None:
    """The recall of a head with its own budgets, seen by an observer of a sparse prefill of the
    same policy, is above the threshold in those heads that are not named as diffuse."""
    out = tmp_path / "plan.json"
    assert cli.run_command(arguments(model, texts, out)) == 0
    plan, unrefined = SparsityPlan.load(out), SparsityPlan.load(tmp_path / "plan.unrefined.json")
    facts = plan.provenance
    assert (facts["length"], facts["threshold"], facts["texts"]) == (LENGTH, 0.9, 1)
    assert len(facts["model_hash"]) == 32 and facts["text"] and facts["date"]
    shown = capsys.readouterr()
    assert "calibrated budgets" in shown.out and (tmp_path / "plan.svg").is_file()
    assert not (tmp_path / "plan.partial.json").exists()
    grown = [new >= old for news, olds in zip(plan.vertical, unrefined.vertical, strict=True)
             for new, old in zip(news, olds, strict=True)]
    assert all(grown) and plan.vertical != unrefined.vertical
    diffuse = {(head["layer"], head["head"]) for head in facts["diffuse"]}
    for layer, row in enumerate(facts["recall"]):
        for head, value in enumerate(row):
            assert (value < 0.9) == ((layer, head) in diffuse)
    assert all(0 <= head["output_error"] < 2 for head in facts["diffuse"])
    with LLM(str(model), device="cpu", attention="sparse", sparsity_plan=str(out)) as llm:
        assert llm.sparsity_plan == plan


def test_recall_is_that_of_the_selection_in_the_pass(model: Path, texts: Path,
                                                     tmp_path: Path) -> None:
    """The unrefined plan's recall in its file is what a slow look at one dense pass gives."""
    out = tmp_path / "plan.json"
    assert cli.run_command(arguments(model, texts, out)) == 0
    plan = SparsityPlan.load(tmp_path / "plan.unrefined.json")
    class Watch(AttentionObserver):
        def __init__(self) -> None:
            self.sums = torch.zeros(3, 4, dtype=torch.float64)

        def attended(self, rows: AttendedRows) -> None:
            if rows.start < LENGTH // 2:
                return
            budget = plan.layer(rows.layer_idx)._replace(num_scouts=0)
            args = (rows.q, rows.cache, rows.item.block_table, rows.start, rows.rotary,
                    rows.item.scale)
            kept = ops.sparse_prefill_attention(
                *args, ops.select_vertical_slash(*args, budget), False)[1]
            self.sums[rows.layer_idx] += torch.exp(kept - rows.full_lse()).sum(0).double()

    job = command.CalibrateJob(model=str(model), out=out, length=LENGTH, recall=0.9,
                               text_roots=(texts,))
    watch = Watch()
    with LLM(str(model), device="cpu", attention="dense", prefill_chunk_len=512) as llm:
        found, _ = command._texts(job, llm)
        llm.observe(watch)
        llm.generate(found[0], command.SCORED)
    written = torch.tensor(plan.provenance["recall"], dtype=torch.float64)
    assert (watch.sums / (LENGTH // 2) - written).abs().max() < 1e-4 and written.min() < 0.99


def test_a_stopped_calibration_goes_on_and_ends_the_same(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture,
) -> None:
    whole, stopped = tmp_path / "whole.json", tmp_path / "stopped.json"
    assert cli.run_command(arguments(model, texts, whole, texts=2)) == 0
    update, seen = PrefillBar.update, []

    def interrupted(bar: Any, event: Progress) -> None:
        update(bar, event)
        seen.append(event.num_prefilled_tokens)
        if len(seen) == 8:  # in the first text of the refinement
            raise KeyboardInterrupt

    monkeypatch.setattr(PrefillBar, "update", interrupted)
    assert cli.run_command(arguments(model, texts, stopped, texts=2)) == 130
    assert "the same command goes on with" in capsys.readouterr().err and not stopped.exists()
    begun = json.loads((tmp_path / "stopped.partial.json").read_text())
    assert begun["phases"]["refine"]["tokens"] > 0
    assert cli.run_command(arguments(model, texts, stopped, length=1024, texts=2)) == 2
    assert "length 2048, now 1024" in capsys.readouterr().err
    assert cli.run_command(arguments(model, texts, stopped, texts=2)) == 0
    assert SparsityPlan.load(stopped) == SparsityPlan.load(whole)


@pytest.mark.parametrize(("changes", "message"), [
    ({"recall": 1.5}, "recall is 1.5"), ({"length": "1000"}, "--length is 1000"),
    ({"length": "many"}, "'many' is no number of tokens"), ({"texts": 0}, "--texts is 0"),
    ({"length": "128k"}, "--length 131,072 needs"), ({"text-root": "nowhere"}, "no such folder")])
def test_bad_input_is_one_line(
    changes: dict[str, Any], message: str, texts: Path, tmp_path: Path, capsys: Capture,
) -> None:
    model = write_checkpoint(tmp_path / "model", max_position_embeddings=262_144)
    out = tmp_path / "plan.json"
    assert cli.run_command(arguments(model, texts, out, **changes)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and not out.exists()


def test_a_plan_of_another_model_is_refused(
    model: Path, tmp_path: Path, capsys: Capture,
) -> None:
    plan = SparsityPlan.default(3, 4)
    file = tmp_path / "plan.json"
    SparsityPlan(vertical=plan.vertical, slash=plan.slash, provenance={
        "model": "another", "model_hash": "0" * 32}).save(file)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Hello")
    assert cli.run_command(["generate", str(model), "--prompt-file", str(prompt), "--raw",
                            "--device", "cpu", "--sparsity-plan", str(file)]) == 2
    assert "calibrated for another (weights 00000000)" in capsys.readouterr().err
