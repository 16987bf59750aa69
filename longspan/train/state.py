"""Checkpoints of a training run: the full fp32 state to resume from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from longspan.errors import LongspanError
from longspan.train.phases import Phase

STATE_FILE = "state.pt"


@dataclass(kw_only=True, slots=True)
class Progress:
    """Where a run stands."""

    phase: int = 0
    step: int = 0
    """Steps done in this phase."""
    num_tokens: int = 0
    """Tokens of all phases so far."""
    seconds: float = 0.0
    """Training time of all phases so far, gates and checkpoints excluded."""
    trained_phase: int = -1
    """The last phase that took a step; -1: none did. Between two phases it is not ``phase``."""

    def trained(self, phases: Sequence[Phase]) -> Phase:
        """The phase whose RoPE base and length the weights know. Raises `LongspanError` if none."""
        if self.trained_phase < 0:
            raise LongspanError("the run has not taken a step, so there is nothing to export: "
                                "train it first")
        return phases[self.trained_phase]


def save_state(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Writes model, optimizer and progress atomically to `path`/state.pt."""
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / (STATE_FILE + ".tmp")
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
    }
    torch.save(content, temporary)
    os.replace(temporary, path / STATE_FILE)


def load_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Restores model and optimizer in place; returns the progress."""
    file = path / STATE_FILE
    if not file.is_file():
        raise ValueError(f"nothing to resume: {file} does not exist; start without resume")
    content = torch.load(file, map_location="cpu", weights_only=True)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return Progress(**content["progress"])
