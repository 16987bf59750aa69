"""Our prompts as lm-eval's tasks: the real package reads, asks and scores them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from longspan import cli
from longspan.commands import lm_eval_export
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import LongspanError
from longspan.model.weights import resolve_checkpoint

Capture = pytest.CaptureFixture[str]
JSON = str(Path(sysconfig.get_paths()["stdlib"]) / "json")
TASKS = ("niah_single_1", "niah_multivalue", "vt", "absent")
# In a process of its own: lm-eval and what it imports warn, and warnings are errors in tests.
SCRIPT = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from longspan import LLM
from longspan.commands.lm_eval import as_lm

folder, tag = sys.argv[1:]
with LLM("nano", device="cpu", attention="dense", num_threads=1) as llm:
    lm = as_lm(llm)
    asked, answer = [], lm.generate_until
    def record(requests, **more):
        asked.extend(request.args[0] for request in requests)
        return answer(requests)
    lm.generate_until = record
    manager = TaskManager(include_path=folder, include_defaults=False)
    found = simple_evaluate(model=lm, tasks=[tag], task_manager=manager)
print("RESULT" + json.dumps({"results": found["results"], "asked": asked}, default=str))
"""


def run(*arguments: object) -> int:
    return cli.run_command(["eval", *map(str, arguments)])


def job(*more: object) -> tuple[object, ...]:
    return ("nano", "--task", ",".join(TASKS), "--lengths", "1500", "-n", 2, "--text-root", JSON,
            *more)


def read_lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_lm_eval_scores_them_as_we_do(tmp_path: Path, capsys: Capture) -> None:
    """The same prompts to the letter, the same scores as `eval run` gives."""
    folder = tmp_path / "tasks"
    assert run("build", *job("--format", "lm-eval", "--out", folder)) == 0
    assert "8 prompts in" in capsys.readouterr().err
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"),
                   "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), "longspan_1500"], env=environment,
        capture_output=True, text=True, timeout=300)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")] or [
        pytest.fail(done.stderr[-2000:])]
    found = json.loads(line.removeprefix("RESULT"))
    ours = {line["input"] for file in folder.glob("*.jsonl") for line in read_lines(file)}
    assert len(ours) == 8 and set(found["asked"]) == ours, "prompts reach the model unchanged"
    assert run("run", *job("--device", "cpu", "--threads", 1, "--out", tmp_path / "run")) == 0
    rows = json.loads((tmp_path / "run" / "dca+yarn" / "summary.json").read_text())["rows"]
    scores = {row["task"]: row["score"] for row in rows if row["depth"] is None}
    for task in TASKS:
        theirs = found["results"][f"longspan_{task}_1500"]
        assert theirs["score,none"] == pytest.approx(scores[task], abs=1e-3), task
    assert scores["niah_single_1"] == 1 and 0 < scores["niah_multivalue"] < 1


def test_texts_have_the_tokens_of_their_prompts(tmp_path: Path) -> None:
    """What lm-eval's models encode is what the length was measured in."""
    assert run("build", *job("--format", "lm-eval", "--out", tmp_path)) == 0
    tokenizer = Tokenizer(resolve_checkpoint("nano"))
    for line in read_lines(tmp_path / "longspan_vt_1500.jsonl"):
        ids = tokenizer.encode(line["input"], add_special_tokens=True)
        assert len(ids) == line["prompt_tokens"]
        assert line["reference"].count(", ") == 4


def test_a_scorer_of_another_version() -> None:
    with pytest.raises(LongspanError, match="no task is called 'gone'"):
        lm_eval_export.process_results({"task": "gone", "outputs": ["1"], "facts": "{}"}, ["1"])


@pytest.mark.parametrize(("more", "message"), [
    (("--format", "xml"), "--format: 'xml' is not one of recipes, lm-eval"),
    (("--format", "lm-eval", "--task", "perplexity"), "perplexity is not scored by the text"),
    (("--format", "lm-eval", "--task", "longbench-chat"), "longbench-chat is not scored by"),
])
def test_wrong_options(
    tmp_path: Path, capsys: Capture, more: tuple[str, ...], message: str
) -> None:
    assert run("build", *job(*more, "--out", tmp_path / "x")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line


def test_folders_with_something_else_are_left_alone(tmp_path: Path, capsys: Capture) -> None:
    arguments = ("build", "nano", "--task", "vt", "--text-root", JSON, "-n", 1, "--format",
                 "lm-eval", "--out", tmp_path, "--lengths")
    assert [run(*arguments, length) for length in ("1500", "1500", "2k")] == [0, 0, 2]
    assert "holds longspan_vt_1500.jsonl" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run(*arguments[:-2], tmp_path / "file" / "x", "--lengths", "1500") == 2
