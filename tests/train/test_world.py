"""Two processes give the losses and the weights of one: shared rows, shared places of rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.errors import LongspanError
from longspan.train.batch import ANSWER, FILLER, Batch
from longspan.train.chat import Samples
from longspan.train.loop import RunConfig, run_phases
from longspan.train.loss import _chunk_loss
from longspan.train.model import build_model
from longspan.train.objective import Preference
from longspan.train.phases import Phase
from longspan.train.run_log import read_log
from longspan.train.samples import SampleFeed
from longspan.train.world import ContextGroup, World, joined_world

ROOT = Path(__file__).parents[2]
CASES = [("text", 1), ("text", 2), ("pairs", 1), ("pairs", 2)]
"""(rows, processes that share one)."""
VOCAB = 60


def samples(count: int) -> Samples:
    rng = np.random.default_rng(5)
    lengths = rng.integers(300, 900, count)
    ids = rng.integers(0, VOCAB, int(lengths.sum())).astype(np.uint32)
    starts = np.cumsum([0, *lengths])
    is_answer = np.zeros(len(ids), bool)
    for stop in starts[1:]:
        is_answer[stop - rng.integers(3, 9) : stop] = True
    return Samples(ids, is_answer, starts)


def case_of(name: str, out: Path) -> dict[str, Any]:
    """What ``run_phases`` takes, the same in every process."""
    model = build_model(vocab_size=VOCAB, num_layers=2, hidden_size=32, num_heads=2,
                        num_kv_heads=1, intermediate_size=48)
    ids = torch.arange(4 * 256).reshape(4, 256).int() % VOCAB
    held_out = Batch(ids, torch.ones(ids.shape), torch.full(ids.shape, FILLER, dtype=torch.uint8))
    feed = SampleFeed(stages=(samples(12),), tokens_per_step=4096, identity={}, held_out=held_out,
                      together=2 if name == "pairs" else 1, reference=-torch.arange(12.0))
    objective = Preference(_chunk_loss, 0.1, True, 0.2) if name == "pairs" else None
    phase: Phase = feed.phase(0, name, 1e5, 3e-3)
    return {"model": model, "phases": [phase], "feed": feed, "config": RunConfig(
        out_dir=out, log_every=1, warmup_steps=1, recompute=name == "text",
        objective=objective)}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the cases, run by two processes."""
    out = tmp_path_factory.mktemp("together")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "tests.train.two_processes", str(out)], cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize(("name", "context_parallel"), CASES)
def test_two_processes_are_one(
    together: Path, tmp_path: Path, name: str, context_parallel: int
) -> None:
    run_phases(**case_of(name, tmp_path / "one"))
    folders = (tmp_path / "one", together / f"{name}-{context_parallel}")
    alone, shared = ([row for row in read_log(folder / "log.jsonl")] for folder in folders)
    assert len(alone) == len(shared) > 4
    for first, second in zip(alone, shared, strict=True):
        for key in ("loss", "answer_accuracy", "margin", "right_pairs", "held_out_bits_per_byte"):
            assert first.get(key) == pytest.approx(second.get(key), abs=2e-5), (key, first, second)
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in folders]
    for key, value in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][key], value, rtol=1e-4, atol=1e-5)
    assert states[0]["fingerprint"] == states[1]["fingerprint"]


def test_a_run_of_two_processes_goes_on_in_one(together: Path, tmp_path: Path) -> None:
    """The state is whole, whatever the number of processes."""
    folder = together / "text-2"
    case = case_of("text", folder)
    progress = run_phases(**{**case, "config": RunConfig(
        out_dir=folder, log_every=1, warmup_steps=1, resume=True)})
    assert progress.phase == 1


def test_pieces_of_a_row_cost_the_same() -> None:
    groups = [ContextGroup(rank, 4) for rank in range(4)]
    places = [group.places(64, torch.device("cpu")) for group in groups]
    assert sorted(torch.cat(places).tolist()) == list(range(64))
    assert len({int(part.sum()) for part in places}) == 1


@pytest.mark.parametrize(("shape", "size", "context", "message"), [
    ((3, 128), 2, 1, "cannot be divided over 2 groups"),
    ((2, 130), 2, 2, "cannot be cut into 4 pieces"),
])
def test_steps_that_cannot_be_divided_are_refused(
    shape: tuple[int, int], size: int, context: int, message: str
) -> None:
    world = World(torch.device("cpu"), 0, size, ContextGroup(0, context))
    with pytest.raises(LongspanError, match=message):
        world.check_shape(shape, 1)


def test_context_parallelism_needs_processes() -> None:
    with pytest.raises(LongspanError, match="start them with torchrun"), joined_world("cpu", 2):
        pass


def test_answers_and_text_have_the_kinds_of_the_data() -> None:
    from longspan.data.tokens import Kind

    assert (FILLER, ANSWER) == (Kind.FILLER, Kind.ANSWER)
