"""`longspan eval` end to end: nano on the CPU, a served model, and what people get wrong."""

from __future__ import annotations

import json
import math
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from longspan import cli
from longspan.commands import models, results
from longspan.config import ModelConfig
from longspan.engine.text.tokenizer import Tokenizer
from longspan.model.weights import resolve_checkpoint
from tests.doubles import write_checkpoint
from tests.eval.nasty import FAULTS, NastyServer, look_up

Capture = pytest.CaptureFixture[str]
JSON = str(Path(sysconfig.get_paths()["stdlib"]) / "json")


def run(*arguments: object) -> int:
    return cli.run_command(["eval", *map(str, arguments)])


def read(folder: Path, name: str = "summary.json") -> Any:
    return json.loads((folder / name).read_text())


def test_the_whole_chain_on_nano(tmp_path: Path, capsys: Capture) -> None:
    """Run, go on, score, compare, plot, export."""
    out = tmp_path / "runs"
    job = ("run", "nano", "--task", "needle,niah_multivalue", "--task", "passkey", "--lengths",
           "600,700", "-n", 2, "--depths", 2, "--questions", 2, "--distractors", 0, "--positions",
           "rope", "--attention", "dense,sparse", "--device", "cpu", "--threads", 1, "--out", out,
           "--answer-nll")
    assert run(*job) == 0
    said = capsys.readouterr()
    assert "needle" in said.out and "sparse-rope" in said.err
    dense, sparse = out / "rope", out / "sparse-rope"
    rows = {(row["task"], row["num_tokens"]): row for row in read(dense)["rows"]
            if row["depth"] is None}
    for task in ("needle", "passkey"):
        for length in (600, 700):
            assert rows[task, length]["score"] == 1.0, "nano finds single facts at any length"
            assert (rows[task, length]["n"], rows[task, length]["status"]) == (2, "complete")
            assert rows[task, length]["answer_nll"] < 0.1 and rows[task, length]["ttft_s"] > 0
    assert rows["niah_multivalue", 700]["method"] in ("bootstrap", "wilson")
    assert rows["ruler-11", 700]["score"] is None
    assert read(dense, "run.json")["held_out"] is True
    before = (dense / "samples.jsonl").read_bytes(), (dense / "summary.json").read_bytes()
    assert run(*job) == 0
    assert "nothing was left to do" in capsys.readouterr().err
    assert run("score", dense, sparse) == 0
    assert before == ((dense / "samples.jsonl").read_bytes(), (dense / "summary.json").read_bytes())
    assert run("compare", dense, sparse, "--out", tmp_path / "c.csv") == 0
    assert "undecided" in capsys.readouterr().out, "two prompts prove nothing"
    assert (tmp_path / "c.csv").read_text().startswith("task,num_tokens,n,first,second,difference")
    assert run("plot", dense, sparse, "--out", tmp_path / "plots") == 0
    assert len(list((tmp_path / "plots").glob("*.svg"))) == 6
    assert run("export", dense, "--out", tmp_path / "results") == 0
    (content,) = results.read_bench(tmp_path / "results", "eval")
    assert {row["task"] for row in content["rows"]} == {"needle", "niah_multivalue", "passkey"}
    assert all(row["n"] for row in content["rows"]) and content["commit"]
    for form in ("csv", "ruler"):
        assert run("export", dense, "--format", form, "--out", tmp_path / form) == 0
    lines = (tmp_path / "ruler" / "nano.rope" / "700" / "niah_multivalue.jsonl").read_text()
    assert {"index", "outputs", "pred"} == set(json.loads(lines.splitlines()[0]))


def test_settings_that_share_the_device(tmp_path: Path) -> None:
    """Several documents at a time, by the report's policy: the same answers, and no times."""
    job = ("run", "nano", "--task", "niah_single_1", "--lengths", "1500", "-n", 3, "--device",
           "cpu", "--threads", 1, "--prefill-chunk-len", 512, "--out", tmp_path)
    assert run(*job, "--attention", "dense,paper", "--concurrency", 3) == 0
    (paper,) = [row for row in read(tmp_path / "paper-dca+yarn")["rows"]
                if row["task"] == "niah_single_1" and row["depth"] is None]
    assert (paper["attention"], paper["score"], paper["n"]) == ("paper-dca+yarn", 1.0, 3)
    assert paper["density"] < 1 and (paper["ttft_s"], paper["ttft_n"]) == (None, 0)
    assert read(tmp_path / "dca+yarn")["rows"][0]["density"] == 1


def test_a_served_model(tmp_path: Path, capsys: Capture) -> None:
    """The same prompts over a server full of misfortunes, in two goes."""
    tokenizer = Tokenizer(resolve_checkpoint("nano"))
    nasty = NastyServer(lambda prompt: look_up(tokenizer.decode(prompt)),
                        tuple(fault for fault in FAULTS if fault not in ("429", "silence")),
                        max_model_len=2048)
    with nasty.serve() as url:
        job = ("run", "m", "--url", url, "--tokenizer", "nano", "--task", "passkey", "--lengths",
               "1k", "--questions", 2, "-n", 4, "--concurrency", 4, "--text-root", JSON,
               "--label", "theirs", "--out", tmp_path)
        assert run(*job, "--time-limit-s", 0) == 3
        assert run(*job) == 0
        assert run(*job[:9], "4k", *job[10:]) == 2
    said = capsys.readouterr()
    assert "stopped by the time limit" in said.err
    assert "4,096 tokens are more than the model's limit of 2,048" in said.err
    row = read(tmp_path / "theirs")["rows"][0]
    assert (row["model"], row["attention"], row["score"], row["n"]) == ("m", "theirs", 1.0, 4)
    assert row["held_out"] is False, "this library was in nano's training text"
    assert read(tmp_path / "theirs", "run.json")["about"]["device"]["name"] == "endpoint"


def test_perplexity_in_process(tmp_path: Path) -> None:
    """nano reads its own language: far better than by chance, and better with what came before."""
    assert run("run", "nano", "--task", "perplexity", "--lengths", "1k", "-n", 2, "--device", "cpu",
               "--attention", "dense,sparse", "--positions", "rope", "--out", tmp_path) == 0
    for label in ("rope", "sparse-rope"):
        row = read(tmp_path / label)["rows"][0]
        assert (row["n"], row["status"]) == (2, "complete")
        assert 0 < row["score"] < 0.8 * math.log(ModelConfig.from_dir(
            resolve_checkpoint("nano")).vocab_size)


def test_a_plan_names_the_rows_that_it_makes(tmp_path: Path) -> None:
    """Rows by budgets of a file stand beside those by the checkpoint's own, not in their place."""
    plan = tmp_path / "refined.json"
    plan.write_bytes((resolve_checkpoint("nano") / "sparsity_plan.json").read_bytes())
    assert run("run", "nano", "--task", "perplexity", "--lengths", "512", "-n", 1, "--device",
               "cpu", "--attention", "dense,sparse,paper", "--positions", "rope",
               "--sparsity-plan", plan, "--out", tmp_path / "out") == 0
    for label in ("rope", "refined-rope", "paper-refined-rope"):
        assert read(tmp_path / "out" / label)["rows"][0]["attention"] == label


def test_perplexity_of_a_served_model(tmp_path: Path, capsys: Capture) -> None:
    """Log-probabilities count once, whatever befalls the streams."""
    nasty = NastyServer(
        lambda prompt: "", ("half stream", "error in stream"), score=lambda prompt: [
            None, *(-1.0 - place % 2 for place in range(len(prompt) - 1))])
    with nasty.serve() as url:
        job = ("run", "m", "--url", url, "--tokenizer", "nano", "--task", "perplexity",
               "--lengths", "1k", "-n", 2, "--text-root", JSON)
        assert run(*job, "--out", tmp_path / "a") == 0
        assert run(*job, "--api", "chat", "--out", tmp_path / "b") == 2
        nasty.score = lambda prompt: [None, -1.0]
        assert run(*job, "--out", tmp_path / "c") == 2
    row = read(tmp_path / "a" / "served")["rows"][0]
    assert row["score"] == pytest.approx(1.5, abs=1e-3) and row["n"] == 2
    asked = nasty.requests[0]
    assert (asked["max_tokens"], asked["echo"], asked["logprobs"]) == (0, True, 1)
    said = capsys.readouterr().err
    assert "needs log-probabilities of the prompt" in said
    assert "gave log-probabilities of 1 of 1,022 prompt tokens" in said


def test_a_judge_rates_what_waits_for_it(tmp_path: Path, capsys: Capture) -> None:
    data = tmp_path / "data"
    data.mkdir()
    cases = [{"idx": i, "query": f"Q{i}?", "prompt": f"Text. Q{i}?", "answer": "A"}
             for i in (1, 2)]
    (data / "test_cases.json").write_text(json.dumps(cases))
    (data / "few_shots.json").write_text(json.dumps([[{"answer": "x", "score": 5}] * 3] * 2))
    nasty = NastyServer(lambda prompt: "[[8]]" if isinstance(prompt[0], dict) and "Q1?" in
                        prompt[-1]["content"] else "my answer")
    with nasty.serve() as url:
        assert run("run", "m", "--url", url, "--tokenizer", "nano", "--task", "longbench-chat",
                   "--data", data, "--text-root", JSON, "--out", tmp_path) == 0
        folder = tmp_path / "served"
        assert read(folder)["rows"][0]["status"] == "2 not judged"
        for _ in range(2):
            assert run("score", folder, "--judge-url", url) == 0
    row = read(folder)["rows"][0]
    assert (row["score"], row["n"], row["status"]) == (0.8, 1, "1 not judged")
    assert "the judge gave no rating: 'my answer'" in capsys.readouterr().err
    asked = [body["messages"][-1]["content"] for body in nasty.requests if "messages" in body]
    assert len(asked) == 3, "what has a rating is not asked about again"


def test_recipes(tmp_path: Path, capsys: Capture) -> None:
    job = ("build", "nano", "--task", "vt", "--lengths", "1k", "-n", 3, "--text-root", JSON)
    for name, more in (("a", ()), ("b", ("--text",))):
        assert run(*job, "--out", tmp_path / name, *more) == 0
    first, second = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
                     for name in ("a", "b"))
    assert [line.pop("input").count("Memorize and track") for line in second] == [2, 2, 2]
    assert first == second and len({line["ids_sha256"] for line in first}) == 3
    assert "3 prompts" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file/x.jsonl", "folder"])
def test_recipes_that_cannot_be_written(tmp_path: Path, capsys: Capture, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert run("build", "nano", "--task", "vt", "--lengths", "1k", "--text-root", JSON, "--out",
               tmp_path / place) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "choose another" in said


def test_the_list(capsys: Capture) -> None:
    assert run("list") == 0
    assert "niah_multikey_3" in capsys.readouterr().out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny"), max_position_embeddings=8192))


def tiny_run(tiny: str, out: Path, *more: object) -> int:
    """Options that may be given once take the place of those here."""
    usual = {"--lengths": "2000", "-n": 1, "--device": "cpu", "--out": out}
    left = [word for pair in usual.items() if pair[0] not in more for word in pair]
    return run("run", tiny, "--task", "needle", "--text-root", JSON, *left, *more)


@pytest.mark.parametrize(("more", "message"), [
    (["--attention", "auto"], "--attention: 'auto' is not one of dense, sparse, paper"),
    (["--positions", "alibi"], "--positions: 'alibi'"),
    (["--lengths", "4q"], "--lengths: '4q' is not a number"),
    (["--lengths", "100"], "100 tokens, answer included, are too short for 1 facts"),
    (["--lengths", "16k"], "16,384 tokens are more than the model's limit of 8,192"),
    (["--text-root", "/no/such/folder"], "no such folder of texts"),
    (["-n", "0"], "at least one is needed"),
    (["--task", "nedle"], "no task is called 'nedle'; did you mean needle"),
    (["--template", "jinja"], "--template: 'jinja' is not one of chat, none"),
    (["--prefix", "system"], "--prefix: 'system' is not one of"),
    (["--words", "/no/words"], "no file of words"),
    (["--task", "qa_1"], "qa_1 needs its data files"),
    (["--url", "here"], "is no address such as"),
])
def test_wrong_options(
    tiny: str, tmp_path: Path, capsys: Capture, more: list[str], message: str
) -> None:
    assert tiny_run(tiny, tmp_path, *more) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line


def test_folders_of_other_runs_are_left_alone(
    tiny: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny_run(tiny, tmp_path) == 0
    before = (tmp_path / "rope" / "samples.jsonl").read_bytes()
    monkeypatch.setattr(models, "LLM", None)  # opening a model would fail
    assert tiny_run(tiny, tmp_path) == 0
    for more, message in ((("--seed", 1), "another setup"), (("--dtype", "bfloat16"), "another"),
                          (("--depths", 3), "holds samples of needle with")):
        assert tiny_run(tiny, tmp_path, *more) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "rope" / "samples.jsonl").read_bytes() == before


def test_other_weights_are_another_setup(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", seed=1)
    setting = models.Setting("dense", "rope")

    def of(**options: Any) -> str:
        return models.fingerprint(models.ModelJob(model=str(path), options=options), setting, {})

    first = of(dtype=None, num_threads=1)
    assert of(dtype=None, num_threads=2) == first
    assert of(dtype="bfloat16", num_threads=1) != first
    write_checkpoint(path, seed=2)
    assert of(dtype=None, num_threads=1) != first


@pytest.mark.parametrize(("arguments", "message"), [
    (("score", "/no/such/run"), "no run there"),
    (("export", "/no/such/run", "--format", "xml"), "--format: 'xml' is not one of results"),
    (("run", "somebody/model", "--url", "http://127.0.0.1:9/v1", "--task", "vt", "--lengths",
      "4k"), "name the tokenizer of the model behind --url with --tokenizer")])
def test_wrong_folders_and_names(
    capsys: Capture, arguments: tuple[str, ...], message: str
) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
