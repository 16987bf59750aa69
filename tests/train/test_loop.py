"""Two tiny phases: the wiring, resuming, the deadline, the gate, the report."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from longspan.errors import LongspanError, NotEnoughMemoryError
from longspan.train import step as step_module
from longspan.train.batch import ANSWER, Batch
from longspan.train.gate import Haystack, inference_copy, score_haystacks
from longspan.train.loop import RunConfig, run_phases
from longspan.train.model import CausalLM, build_model, hidden_states, set_rope
from longspan.train.phases import Phase, Shape
from longspan.train.report import write_results
from longspan.train.run_log import read_log
from longspan.train.state import Progress, load_weights

VOCAB = 64
PHASES = [
    Phase(
        name="a", seq_len=128, rope_theta=1e4, num_tokens=2048, learning_rate=3e-3,
        tokens_per_step=256),
    Phase(
        name="b", seq_len=256, rope_theta=1e6, num_tokens=1024, learning_rate=1e-3,
        tokens_per_step=256, shorter=(128,), full_share=0.75)]


def tiny(num_layers: int = 2) -> Qwen2ForCausalLM:
    return build_model(
        vocab_size=VOCAB, num_layers=num_layers, hidden_size=64, num_heads=2, num_kv_heads=1,
        intermediate_size=96)


@dataclass
class Rows:
    """Rows that repeat one token pair, by phase and step; ``dies_after`` batches a run is killed,
    its state unsaved."""

    dies_after: int | None = None
    at_batch: dict[int, Callable[[], None]] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    held_out: Batch | None = None

    def schedule(self, index: int, phase: Phase) -> list[Shape]:
        return phase.schedule()

    def batches(self, index: int, phase: Phase, first: int) -> Iterator[Batch]:
        schedule = phase.schedule()
        for step in range(first, len(schedule)):
            if self.dies_after is not None:
                self.dies_after -= 1
                if self.dies_after < 0:
                    raise KeyboardInterrupt
            if step in self.at_batch:
                self.at_batch[step]()
            yield rows_of(100 * index + step, schedule[step], is_answer=step % 2 == 1)


def rows_of(seed: int, shape: Shape, is_answer: bool) -> Batch:
    num_rows, length = shape
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(0, VOCAB, (num_rows, 2), generator=generator)
    kinds = torch.zeros(num_rows, length, dtype=torch.uint8)
    kinds[:, 2:] = ANSWER * is_answer
    weights = 1.0 + 4.0 * (kinds == ANSWER)
    return Batch(pairs.repeat(1, length // 2).int(), weights, kinds)


def config(out_dir: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {"warmup_steps": 2, "log_every": 2}
    return RunConfig(out_dir=out_dir, **(values | changes))


def test_runs_all_phases_and_reports(tmp_path: Path) -> None:
    seen: list[Any] = []

    def gate(model: CausalLM, phase: Phase) -> dict[str, Any]:
        seen.append(model.config.rope_parameters["rope_theta"])
        return {"exact": 0.5}

    progress = run_phases(tiny(), PHASES, Rows(), config(tmp_path), gate)
    assert (progress.phase, progress.num_tokens) == (2, 3072)
    assert seen == [1e4, 1e6]
    steps = steps_of(tmp_path)
    assert [r["num_tokens"] for r in steps] == [512, 1024, 1536, 2048, 2560, 3072]
    assert steps[-1]["loss"] < steps[0]["loss"]
    result = write_results(
        tmp_path / "log.jsonl", tmp_path / "r" / "train.cpu.json", model="tiny", command="c",
        commit="x")
    assert result == json.loads((tmp_path / "r" / "train.cpu.json").read_text())
    assert [r["num_tokens_trained"] for r in result["rows"]] == [2048, 1024]
    assert result["rows"][1]["gate"]["exact"] == 0.5


@pytest.mark.parametrize("cut", [3, 9])
def test_resume_equals_one_run(tmp_path: Path, cut: int) -> None:
    whole, parts = tiny(), tiny()
    run_phases(whole, PHASES, Rows(), config(tmp_path / "whole"))
    always = partial(config, tmp_path / "parts", save_every_s=-1.0)
    with pytest.raises(KeyboardInterrupt):
        run_phases(parts, PHASES, Rows(dies_after=cut), always())
    resumed = tiny()
    progress = run_phases(resumed, PHASES, Rows(), always(resume=True))
    assert progress.num_tokens == 3072
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)


def test_deadline_saves_and_stops(tmp_path: Path) -> None:
    progress = run_phases(tiny(), PHASES, Rows(), config(tmp_path, deadline_s=1e-6))
    assert (tmp_path / "state.pt").is_file()
    assert progress.phase == 0


def test_a_run_that_ends_between_phases_was_trained_in_the_first(tmp_path: Path) -> None:
    stop = threading.Event()

    def gate(*_: Any) -> dict[str, Any]:
        stop.set()
        return {}

    progress = run_phases(tiny(), PHASES, Rows(), config(tmp_path), gate, stop)
    assert (progress.phase, progress.step) == (1, 0)
    assert progress.trained(PHASES) is PHASES[0]
    assert load_weights(tmp_path, tiny()) == PHASES[0]
    progress = run_phases(tiny(), PHASES, Rows(), config(tmp_path, resume=True))
    assert progress.phase == 2 and progress.trained(PHASES) is PHASES[1]


def test_nothing_is_exported_before_the_first_step() -> None:
    with pytest.raises(LongspanError, match="has not taken a step"):
        Progress().trained(PHASES)


def test_stop_ends_a_phase_in_any_thread(tmp_path: Path) -> None:
    stop = threading.Event()
    stopping = Rows(at_batch={2: stop.set})
    results: list[Progress] = []
    thread = threading.Thread(target=lambda: results.append(
        run_phases(tiny(), PHASES, stopping, config(tmp_path), None, stop)))
    thread.start()
    thread.join()
    assert (results[0].phase, results[0].step) == (0, 3)
    assert results[0].trained(PHASES) is PHASES[0]


def test_resume_without_state_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to resume"):
        run_phases(tiny(), PHASES, Rows(), config(tmp_path, resume=True))


def steps_of(out_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_log(out_dir / "log.jsonl") if "phase" in row]


@pytest.mark.parametrize("log_every", [1, 4])
def test_no_step_is_counted_twice(tmp_path: Path, log_every: int) -> None:
    """Steps that were logged but not saved are repeated; saved ones stand in the log."""
    start = partial(config, tmp_path, log_every=log_every)
    with pytest.raises(KeyboardInterrupt):
        run_phases(tiny(), PHASES, Rows(dies_after=3), start(save_every_s=-1.0))
    with pytest.raises(KeyboardInterrupt):
        run_phases(tiny(), PHASES, Rows(dies_after=4), start(resume=True))
    progress = run_phases(tiny(), PHASES, Rows(), start(resume=True))
    steps = steps_of(tmp_path)
    counts = [row["num_tokens"] for row in steps]
    assert counts == sorted(set(counts)) and counts[-1] == progress.num_tokens == 3072
    before = [0, *counts[:-1]]
    assert [round(row["tokens_per_s"] * row["seconds"]) for row in steps] == pytest.approx(
        [now - then for now, then in zip(counts, before, strict=True)], rel=0.02)
    assert sum(row["seconds"] for row in steps) == pytest.approx(progress.seconds, abs=1e-3)
    result = write_results(
        tmp_path / "log.jsonl", tmp_path / "r.json", model="tiny", command="c", commit="x")
    assert [r["num_tokens_trained"] for r in result["rows"]] == [2048, 1024]


def test_a_new_run_does_not_mix_with_another(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_phases(tiny(), PHASES, Rows(dies_after=3), config(tmp_path))
    run_phases(tiny(), PHASES, Rows(), config(tmp_path))
    assert [r["num_tokens"] for r in steps_of(tmp_path)] == [512 * i for i in range(1, 7)]
    with pytest.raises(LongspanError, match="holds the state of a run: resume it, or name"):
        run_phases(tiny(), PHASES, Rows(), config(tmp_path))


def test_a_line_cut_short_is_named_and_mended_by_resuming(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_phases(tiny(), PHASES, Rows(dies_after=4), config(tmp_path, save_every_s=-1.0))
    whole = log.read_text()
    log.write_text(whole + '{"phase": "a", "st')
    with pytest.raises(LongspanError, match="line 6 is cut short: resume the run"):
        read_log(log)
    run_phases(tiny(), PHASES, Rows(), config(tmp_path, resume=True))
    assert log.read_text().startswith(whole)
    assert steps_of(tmp_path)[-1]["num_tokens"] == 3072


@pytest.mark.parametrize(("changes", "phases", "message"), [
    ({}, PHASES, "another data:"),
    ({}, PHASES, "another tokenizer:"),
    ({"seed": 7}, PHASES, r"another seed \(0, now 7\):"),
    ({"final_lr": 1e-4}, PHASES, "another final_lr"),
    ({}, [PHASES[0], replace(PHASES[1], num_tokens=2048)], "another phase b:"),
    ({}, PHASES[:1], "another phase b:"),
    ({}, [replace(PHASES[0], name="c"), PHASES[1]], "another phase a, phase c:"),
    ({}, PHASES, "another model:"),
])
def test_resuming_with_another_is_refused(
    tmp_path: Path, changes: dict[str, Any], phases: list[Phase], message: str
) -> None:
    identity = {"data": "a" * 64, "tokenizer": "b" * 64}
    start = partial(config, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run_phases(tiny(), PHASES, Rows(dies_after=3, identity=identity),
                   start(save_every_s=-1.0))
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    for name in ("data", "tokenizer"):
        if f"another {name}" in message:
            identity[name] = "c" * 64
    model = tiny(num_layers=3) if "model" in message else tiny()
    with pytest.raises(LongspanError, match=message) as caught:
        run_phases(model, phases, Rows(identity=identity), start(resume=True, **changes))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def test_a_gate_that_was_missed_is_asked_on_resuming(tmp_path: Path) -> None:
    asked: list[tuple[str, Any]] = []

    def gate(model: CausalLM, phase: Phase) -> dict[str, Any]:
        asked.append((phase.name, model.config.rope_parameters["rope_theta"]))
        if len(asked) == 1:
            raise KeyboardInterrupt
        return {"exact": 1.0}

    with pytest.raises(KeyboardInterrupt):
        run_phases(tiny(), PHASES, Rows(), config(tmp_path), gate)
    for _ in range(2):
        run_phases(tiny(), PHASES, Rows(), config(tmp_path, resume=True), gate)
    assert asked == [("a", 1e4), ("a", 1e4), ("b", 1e6)]
    gates = [row["gate"] for row in read_log(tmp_path / "log.jsonl") if "gate" in row]
    assert gates == ["a", "b"]


@pytest.mark.parametrize("at_once", [2, 1])
def test_out_of_memory_is_tried_again_with_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Recomputed, then with fewer rows whose gradients add up. Outside the handler of the error,
    whose frames hold the activations."""
    plain, small = tiny(), tiny()
    run_phases(plain, PHASES, Rows(), config(tmp_path / "plain"))
    handled: list[object] = []

    def needs_recomputation(*arguments: Any) -> torch.Tensor:
        if not arguments[4] or len(arguments[1]) > at_once:
            raise torch.OutOfMemoryError("full")
        handled.append(sys.exc_info()[0])
        return hidden_states(*arguments)

    monkeypatch.setattr(step_module, "hidden_states", needs_recomputation)
    run_phases(small, PHASES, Rows(), config(tmp_path / "small"))
    assert set(handled) == {None} and len(handled) >= 12 * 2 // at_once - 3
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], value)


def test_a_row_that_does_not_fit_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(step_module, "hidden_states", full)
    with pytest.raises(NotEnoughMemoryError, match="a row of 128 tokens does not fit"):
        run_phases(tiny(), PHASES, Rows(), config(tmp_path))


def test_rows_at_once_changes_no_gradient(tmp_path: Path) -> None:
    whole, parts = tiny(), tiny()
    run_phases(whole, PHASES, Rows(), config(tmp_path / "whole"))
    run_phases(parts, PHASES, Rows(), config(tmp_path / "parts", rows_at_once=1))
    first, second = (steps_of(tmp_path / name) for name in ("whole", "parts"))
    assert [row["loss"] for row in first] == pytest.approx(
        [row["loss"] for row in second], abs=1e-5)


def test_held_out_text_is_measured_before_and_after(tmp_path: Path) -> None:
    held_out = rows_of(7, (3, 128), is_answer=False)
    run_phases(tiny(), PHASES, Rows(held_out=held_out), config(tmp_path, token_bytes=(2,) * VOCAB))
    model = tiny()
    set_rope(model, 1e4, 4096)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        plain = model(held_out.ids.long(), labels=held_out.ids.long()).loss.item()
    rows = [row for row in read_log(tmp_path / "log.jsonl") if "gate" in row]
    assert [row["gate"] for row in rows] == ["before", "a", "b"]
    assert rows[0]["held_out_bits_per_byte"] == pytest.approx(plain / math.log(2) / 2, abs=1e-4)
    assert rows[-1]["held_out_bits_per_byte"] < rows[0]["held_out_bits_per_byte"]


def test_an_untied_head_is_trained(tmp_path: Path) -> None:
    model = tiny()
    untied = Qwen2ForCausalLM(Qwen2Config(**{**model.config.to_dict(),
                                             "tie_word_embeddings": False}))
    untied.set_attn_implementation("longspan_causal")
    before = untied.lm_head.weight.clone()
    run_phases(untied, PHASES, Rows(), config(tmp_path))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert (untied.lm_head.weight - before).abs().max() > 1e-3
    losses = [row["loss"] for row in steps_of(tmp_path)]
    assert losses[-1] < losses[0]


def test_gate_equals_a_plain_forward() -> None:
    model = tiny()
    set_rope(model, 1e5, 256)
    document = torch.randint(0, VOCAB, (50,)).tolist()
    question = torch.randint(0, VOCAB, (5,)).tolist()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        greedy = model(torch.tensor([document + question])).logits[0, -1].argmax().item()
    model.set_attn_implementation("longspan_causal")
    wrong = (greedy + 1) % VOCAB
    asked = [(question, [greedy]), (question, [wrong]), (question, [greedy])]
    score = score_haystacks(inference_copy(model), [Haystack(document, asked)])
    assert (score.num_questions, score.num_exact, score.num_token_hits) == (3, 2, 2)
