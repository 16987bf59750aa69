"""A fake runner for another process: `load` is named to it, files tell it what to do.

In the model's directory: ``fake.json`` with ``step_s`` and ``error``; while ``hold`` exists no step
ends; ``steps.log`` receives a line for each step, [[request id, tokens, ran ahead], ...];
``asked.json`` holds what the configuration said when it arrived.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from longspan.config import EngineConfig
from longspan.engine.control.scheduler import SchedulerConfig
from longspan.engine.intake import Intake
from longspan.engine.processes.backend import Send
from longspan.engine.processes.wire import Described
from longspan.engine.step import ScheduledBatch
from longspan.errors import CheckpointError
from tests.doubles import ComputedStep, FakeRunner, write_tokenizer

LOADER = f"{__name__}:load"
BLOCK, CHUNK, NUM_BLOCKS, MAX_LEN = 4, 8, 40, 64
POLL_S = 0.002


class FarRunner(FakeRunner):
    """Checks block tables and the KV cache as its base does."""

    def __init__(self, path: Path, step_s: float) -> None:
        super().__init__(num_blocks=NUM_BLOCKS, block_size=BLOCK, prefill_chunk_len=CHUNK)
        self.path, self.step_s = path, step_s

    def launch(self, batch: ScheduledBatch) -> ComputedStep:
        """Compute now, as CPUs do."""
        rows = [(item.request_id, item.query_len * batch.repeats, item.is_run_ahead)
                for item in batch.slices]
        with (self.path / "steps.log").open("a") as file:
            file.write(json.dumps(rows) + "\n")
        time.sleep(self.step_s)
        while (self.path / "hold").exists():
            time.sleep(POLL_S)
        return super().launch(batch)

    def prepare(self, constraint: str) -> None:
        """As slow as what is hard to compile."""
        with (self.path / "prepared.log").open("a") as file:
            file.write(f"{constraint}\n")
        while (self.path / "hold-grammars").exists():
            time.sleep(POLL_S)

    def close(self) -> None:
        """Nothing to free."""


def load(config: EngineConfig, send: Send) -> tuple[SchedulerConfig, FarRunner]:
    """As `longspan.engine.setup.load.load_engine`."""
    path = Path(config.model)
    options = json.loads((path / "fake.json").read_text())
    (path / "asked.json").write_text(json.dumps({"step_budget_s": str(config.step_budget_s)}))
    scheduler = SchedulerConfig(
        num_blocks=NUM_BLOCKS, block_size=BLOCK, max_model_len=MAX_LEN, prefill_chunk_len=CHUNK,
        max_num_requests=4, burst_s=options.get("burst_s", 0.0))
    send(Described(path=path, intake=Intake(vocab_size=300, max_model_len=MAX_LEN),
                 scheduler=scheduler))
    if "error" in options:
        raise CheckpointError(options["error"])
    return scheduler, FarRunner(path, options.get("step_s", 0.0))


def write_model(path: Path, **options: Any) -> Path:
    """What `load` reads."""
    write_tokenizer(path)
    (path / "fake.json").write_text(json.dumps(options))
    return path


def steps(path: Path) -> list[list[tuple[str, int, bool]]]:
    """What was computed."""
    file = path / "steps.log"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [[(name, length, ahead) for name, length, ahead in json.loads(line)] for line in lines]
