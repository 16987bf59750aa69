"""The command line: answers on stdout, one line on stderr for what a person can mend."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longspan import cli
from longspan.commands import generate
from longspan.commands.console import PrefillBar, prefill_rate
from longspan.commands.options import parse_list
from longspan.engine.front.llm import LLM
from longspan.engine.intake import Intake
from longspan.engine.request import Progress, SamplingParams
from longspan.errors import LongspanError
from tests.doubles import begin_texts_with, write_checkpoint, write_tokenizer

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=2048))


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    file = tmp_path / "prompt.txt"
    file.write_text("A short document about nothing.\n")
    return str(file)


def failure(capsys: Capture, *arguments: str) -> str:
    """The one line that a failing command prints."""
    assert cli.run_command(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def test_answers_on_stdout_and_reports_on_stderr(capsys: Capture, model: str, prompt: str) -> None:
    assert cli.run_command(["generate", model, "--prompt-file", prompt, "--question", "Which?",
                            "--max-tokens", "5", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("\n")
    for name in ("prompt tokens", "time to first token", "decode", "attention density",
                 "peak memory"):
        assert name in captured.err


def test_json_holds_the_whole_result(capsys: Capture, model: str, prompt: str) -> None:
    arguments = ["generate", model, "--prompt-file", prompt, "--max-tokens", "4", "--json",
                 "--device", "cpu", "--seed", "3", "--temperature", "0.7", "--stop", "x"]
    assert cli.run_command(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    # <user> and <assistant>, the text's 32 bytes, <end>
    assert result["num_prompt_tokens"] == 35
    assert result["ttft_s"] > 0 and result["peak_memory_bytes"] > 0 and result["density"] == 1
    assert cli.run_command([*arguments, "--raw"]) == 0
    assert json.loads(capsys.readouterr().out)["num_prompt_tokens"] == 32


def test_a_chat_begins_with_one_begin_of_text(
    capsys: Capture, prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_checkpoint(model, max_position_embeddings=2048)
    begin_texts_with(model, "<end>", 256)
    (model / "chat_template.jinja").write_text("<end><user>{{ messages[0].content }}<assistant>")
    seen = list[list[int]]()
    make = Intake.make

    def spy(self: Intake, request_id: str, prompt_ids: Any, *rest: Any) -> Any:
        seen.append(list(prompt_ids))
        return make(self, request_id, prompt_ids, *rest)

    monkeypatch.setattr(Intake, "make", spy)
    arguments = ["generate", str(model), "--prompt-file", prompt, "--max-tokens", "2", "--device",
                 "cpu"]
    assert cli.run_command(arguments) == cli.run_command([*arguments, "--raw"]) == 0
    with LLM(str(model), device="cpu") as llm:
        llm.chat([{"role": "user", "content": Path(prompt).read_text()}],
                 SamplingParams(max_tokens=2))
        llm.generate(Path(prompt).read_text(), SamplingParams(max_tokens=2))
    chat, raw = seen[:2]
    assert [chat[:2], chat.count(256)] == [[256, 257], 1]
    assert [raw[0], raw.count(256)] == [256, 1]
    assert seen[2:] == [chat, raw]


def test_the_engine_is_sized_for_one_request(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, model: str, prompt: str
) -> None:
    """A GPU's KV pool has room for all that may run together."""
    sizes: list[int] = []

    class Sized(LLM):
        def __init__(self, model: str, **options: Any) -> None:
            sizes.append(options["max_num_requests"])
            super().__init__(model, **options)

    monkeypatch.setattr(generate, "LLM", Sized)
    assert cli.run_command(["generate", model, "--prompt-file", prompt, "--device", "cpu",
                            "--max-tokens", "1"]) == 0
    assert sizes == [1]


def test_reads_standard_input(
    capsys: Capture, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Some text")))
    arguments = ["generate", model, "--prompt-file", "-", "--max-tokens", "2", "--json"]
    assert cli.run_command([*arguments, "--question", "What?"]) == 0
    assert json.loads(capsys.readouterr().out)["num_prompt_tokens"] == 3 + len("Some text\n\nWhat?")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xc3")))
    assert "standard input: not UTF-8 text (byte 0xc3 at offset 1)" in failure(capsys, *arguments)


@pytest.mark.parametrize(("data", "message"), [
    (b"", "the prompt is empty"),
    (b" \n\t\n", "the prompt is empty"),
    (b"caf\xe9 noir", "not UTF-8 text (byte 0xe9 at offset 3)"),
], ids=["empty", "blank", "latin-1"])
def test_unfit_prompts(
    capsys: Capture, model: str, tmp_path: Path, data: bytes, message: str
) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(data)
    line = failure(capsys, "generate", model, "--prompt-file", str(file))
    assert message in line and str(file) in line


def test_prompt_files_that_cannot_be_read(capsys: Capture, model: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.txt")
    line = failure(capsys, "generate", model, "--prompt-file", missing)
    assert line == f"{missing}: no such file"
    assert "is a directory" in failure(capsys, "generate", model, "--prompt-file", str(tmp_path))
    odd = str(tmp_path / ("x" * 300))
    assert "too long" in failure(capsys, "generate", model, "--prompt-file", odd)
    assert "name is empty" in failure(capsys, "generate", model, "--prompt-file", "")


def test_a_prompt_over_the_limit_names_both_numbers(
    capsys: Capture, model: str, tmp_path: Path
) -> None:
    file = tmp_path / "long.txt"
    file.write_text("x" * 3000)
    line = failure(capsys, "generate", model, "--prompt-file", str(file), "--max-tokens", "7")
    assert "3003" in line.replace(",", "") and "2048" in line.replace(",", "")


def test_unfit_checkpoints(capsys: Capture, prompt: str, tmp_path: Path, model: str) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json" in failure(capsys, "generate", str(empty), "--prompt-file", prompt)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
    assert "no tokenizer.json" in failure(capsys, "generate", str(bare), "--prompt-file", prompt)
    write_tokenizer(bare, chat_template=None)
    (bare / "model.safetensors").write_bytes((Path(model) / "model.safetensors").read_bytes())
    assert "no chat template" in failure(capsys, "generate", str(bare), "--prompt-file", prompt)
    for missing in (str(tmp_path / "missing"), "m" * 5000, "~nobody/m", "m\0"):
        assert f"{missing}: no such directory" in failure(
            capsys, "generate", missing, "--prompt-file", prompt)
    assert "no name: no such directory" in failure(capsys, "info", "")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--top-p", "2"], "top_p is 2.0"), (["--max-tokens", "0"], "max_tokens is 0"),
    (["--device", "tpu"], "device 'tpu' is not supported"),
    (["--dtype", "int3"], "dtype 'int3' is not supported"),
    (["--positions", "near"], "positions 'near' is not one of auto, rope, dca, dca+yarn"),
    (["--attention", "lazy"], "attention 'lazy'"),
    (["--threads", "0"], "num_threads must be positive"),
    (["--prefill-chunk-len", "100"], "multiple of block_size"),
    (["--memory-gib", "0.0001"], "GiB"), (["--sparsity-plan", "no.json"], "no.json"),
    (["--top-k", "many"], "Invalid value for '--top-k'"), (["--memory-gib", "nan"], "memory_gib"),
    (["--temperature", "nan"], "temperature is nan"), (["--stop", ""], "stop is ('',)"),
    (["--max-model-len", "0"], "max_model_len must be positive, not 0"),
    (["--max-model-len", "9" * 12], "lower max_model_len to"),
])
def test_wrong_options(
    capsys: Capture, model: str, prompt: str, arguments: list[str], message: str
) -> None:
    assert message in failure(capsys, "generate", model, "--prompt-file", prompt, *arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--port", "70000"], "port 70000 is not between"), (["--port", "x"], "value for '--port'"),
    (["--host", ""], "host is empty"), (["--api-key", ""], "API key must be printable"),
    (["--step-budget-s", "0"], "step_budget_s must be positive, not 0.0"),
    (["--step-budget-s", "nan"], "step_budget_s must be positive, not nan"),
    (["--step-budget-s", "inf"], "step_budget_s must be finite"),
    (["--threads", "0"], "num_threads must be positive"), (["--model-name", ""], "model_name is"),
    (["--attention", "lazy"], "attention 'lazy' is not one of"),
    (["--drain-timeout-s", "-1"], "drain_timeout_s must be 0 or more, not -1.0"),
])
def test_wrong_options_of_a_server(
    capsys: Capture, model: str, arguments: list[str], message: str
) -> None:
    assert message in failure(capsys, "serve", model, *arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--soak", "-1"], "--soak must be 0 or a number of seconds, not -1.0"),
    (["--soak", "nan"], "--soak must be"), (["--budget-s", "0"], "--budget-s must be positive"),
    (["--batches", "0,-1,abc"], "--batches: 'abc' is not a number"),
    (["--batches", "4,-1"], "--batches: '4,-1' has an item that is empty or not positive"),
    (["--device", "tpu"], "device 'tpu' is not supported"), (["--length", "0"], "'--length'"),
    (["--scenario", "rest"], "--scenario: 'rest' is not one of"),
    (["--out", "/dev/null/x"], "/dev/null/x: no folder for results (Not a directory)"),
])
def test_wrong_options_of_a_server_benchmark(
    capsys: Capture, model: str, arguments: list[str], message: str
) -> None:
    assert message in failure(capsys, "bench", "serve", "--model", model, *arguments)


@pytest.mark.parametrize(("arguments", "command"), [
    (["generate"], " generate"), (["fly"], ""), (["generate", "x", "--fast"], " generate"),
    (["generate", "x", "--prompt-file", "a", "--prompt-file", "b"], ""),
    (["bench", "cache", "--fast"], " bench cache"), (["eval"], " eval")])
def test_wrong_usage(capsys: Capture, arguments: list[str], command: str) -> None:
    assert f"see longspan{command} --help" in failure(capsys, *arguments)


def test_info_needs_config_json_only(capsys: Capture, model: str, tmp_path: Path) -> None:
    raw = json.loads((Path(model) / "config.json").read_text())
    raw |= {"max_position_embeddings": 1_010_000, "dual_chunk_attention_config": {
        "chunk_size": 1024, "local_size": 128, "original_max_position_embeddings": 2048}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    arguments = ["info", str(tmp_path), "--device", "cpu"]
    assert cli.run_command([*arguments, "--length", "100000"]) == 0
    out = capsys.readouterr().out
    for text in ("weights", "KV cache", "workspace", "longest prompt", "sparse", "dca+yarn",
                 "density budget", "fits: yes"):
        assert text in out
    assert cli.run_command([*arguments, "--length", "100", "--positions", "dca"]) == 0
    out = capsys.readouterr().out
    assert "dca+yarn" not in out
    found = re.search(r"dense \(sparse above ([\d,]+) tokens\)", out)
    assert found is not None and 16_384 <= int(found[1].replace(",", "")) <= 32_768
    assert cli.run_command([*arguments, "--length", "100000", "--memory-gib", "0.01",
                            "--attention", "dense"]) == 0
    assert "fits: no" in capsys.readouterr().out
    assert "length must be positive, not -1" in failure(capsys, *arguments, "--length", "-1")


def test_info_on_a_plain_model_is_dense(capsys: Capture, model: str) -> None:
    assert cli.run_command(["info", model, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "2,048 tokens" in out and "rope" in out and "sparse" not in out


def test_errors_of_ours_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, model: str, prompt: str
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(generate, "run", broken)
    with pytest.raises(RuntimeError):
        cli.run_command(["generate", model, "--prompt-file", prompt])


def test_an_interrupt_is_status_130(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, model: str, prompt: str
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "run", interrupted)
    assert cli.run_command(["generate", model, "--prompt-file", prompt]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_loads_nothing_heavy(capsys: Capture) -> None:
    code = ("import sys; from longspan.cli import run_command; run_command(['--help']); "
            "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers')))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "generate" in done.stdout
    assert cli.run_command([]) == 0
    assert "demo" in capsys.readouterr().out


def test_the_process_exits_with_the_status_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longspan", "generate", str(tmp_path), "--prompt-file",
               str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {tmp_path / 'none'}: no such file\n"


def test_a_closed_pipe_is_quiet(model: str, prompt: str) -> None:
    command = [sys.executable, "-m", "longspan.cli", "generate", model, "--prompt-file", prompt,
               "--max-tokens", "40", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait() == 1
    assert "Traceback" not in errors and "Broken" not in errors


def test_lists() -> None:
    assert parse_list("4096, 1_000", int, "--lengths") == (4096, 1000)
    assert parse_list("dense,sparse", str, "--attention") == ("dense", "sparse")
    for text in ("4k", "1,,2", "0", "", "1,-2"):
        with pytest.raises(LongspanError, match="--lengths"):
            parse_list(text, int, "--lengths")


def progress(done: int, elapsed_s: float, cached: int = 0) -> Progress:
    return Progress(request_id="0", num_prefilled_tokens=done, num_prompt_tokens=1000,
                    num_cached_tokens=cached, elapsed_s=elapsed_s)


def test_logs_get_a_line_at_every_tenth(capsys: Capture) -> None:
    with PrefillBar() as bar:
        for done in range(0, 1001, 50):
            bar.update(progress(done, elapsed_s=done / 100))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9, "nothing in the first two seconds, then 20 % to 100 %"
    assert lines[0] == "prefill       200/1,000 tokens  20 %  100 tokens/s, 0:08 left"
    assert lines[-1] == "prefill     1,000/1,000 tokens 100 %  100 tokens/s"
    with PrefillBar() as bar:
        bar.update(progress(1000, elapsed_s=0.5))
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with PrefillBar() as bar:
        for done in (0, 500, 1000):
            bar.update(progress(done, elapsed_s=done / 100))
    assert "500/1,000 tokens" in screen.getvalue()
    assert "100 tokens/s, 0:05 left" in screen.getvalue()


def test_cached_tokens_are_not_speed() -> None:
    assert prefill_rate(progress(900, 1.0, cached=800)) == 100
    assert prefill_rate(progress(900, 1.0, cached=900)) == 0
    assert prefill_rate(progress(0, 0.0)) == 0
