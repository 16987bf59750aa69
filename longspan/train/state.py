"""Checkpoints of a training run: the full fp32 state to resume from, and what it came from."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from longspan.errors import CheckpointError, LongspanError
from longspan.files.whole import replace_file
from longspan.train.phases import Phase
from longspan.train.world import World, like, whole

STATE_FILE = "state.pt"
PARTS = ("model", "optimizer", "progress", "phases", "fingerprint")


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
        """Return the last trained phase. Raises `LongspanError` if none took a step."""
        if self.trained_phase < 0:
            raise LongspanError("the run has not taken a step, so there is nothing to export: "
                                "train it first")
        return phases[self.trained_phase]


def save_state(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress,
    phases: Sequence[Phase], fingerprint: Mapping[str, str], world: World | None = None,
) -> None:
    """Write the state to ``folder``; the one before stays until it is whole.

    Of several processes the first writes, whole tensors whatever their number; all must call this.
    Raises `LongspanError` when the disk is full.
    """
    moments = optimizer.state_dict()
    content = {
        "model": whole_weights(model),
        "optimizer": {**moments, "state": {
            index: {name: whole(value) for name, value in entry.items()}
            for index, entry in moments["state"].items()}},
        "progress": asdict(progress), "phases": [asdict(phase) for phase in phases],
        "fingerprint": dict(fingerprint)}
    if world is None or world.is_first:
        replace_file(folder / STATE_FILE, lambda out: torch.save(content, out))
    if world is not None:
        world.barrier()


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's tensors by name, whole and on the CPU; tied ones are one tensor.

    Every process must ask for it.
    """
    found: dict[int, torch.Tensor] = {}
    weights = model.state_dict(keep_vars=True)
    for value in weights.values():
        if id(value) not in found:
            found[id(value)] = whole(value)
    return {name: found[id(value)] for name, value in weights.items()}


def load_state(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
    fingerprint: Mapping[str, str],
) -> Progress:
    """Restore model and optimizer in place; returns the progress.

    Raises `LongspanError` when there is no state or it comes from a run with another
    ``fingerprint``, `CheckpointError` when it is not whole.
    """
    content = _read(folder)
    _check_same(folder / STATE_FILE, content["fingerprint"], fingerprint)
    current = model.state_dict()
    model.load_state_dict({
        name: like(value, current[name]) for name, value in content["model"].items()})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = content["optimizer"]
    optimizer.load_state_dict({**moments, "state": {
        index: {name: like(value, parameters[index]) for name, value in entry.items()}
        for index, entry in moments["state"].items()}})
    return Progress(**content["progress"])


def load_weights(folder: Path, model: torch.nn.Module) -> Phase:
    """Restore the model alone; returns the phase that trained it last.

    Raises `LongspanError` when there is no state or no step was taken, `CheckpointError` when the
    state is not whole or of another model.
    """
    content = _read(folder)
    phase = Progress(**content["progress"]).trained([Phase(**p) for p in content["phases"]])
    saved = content["model"]
    if shapes(saved) != shapes(model.state_dict()):
        raise CheckpointError(
            f"{folder / STATE_FILE} holds another model ({_num_numbers(saved):,} numbers, not "
            f"{_num_numbers(model.state_dict()):,}): name the recipe that trained it")
    model.load_state_dict(saved)
    return phase


def shapes(tensors: Mapping[str, torch.Tensor]) -> str:
    """Names and shapes of a model's tensors, as one line."""
    return " ".join(f"{name}{tuple(tensor.shape)}" for name, tensor in sorted(tensors.items()))


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files below a folder.

    Raises `LongspanError` when there is nothing at ``path``.
    """
    if not path.exists():
        raise LongspanError(f"{path} does not exist: name what the run is to read")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
        total.update(file.relative_to(path).as_posix().encode() + b"\0")
    return total.hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    file = folder / STATE_FILE
    if not file.is_file():
        raise LongspanError(f"nothing to resume or export: {file} does not exist; train first, "
                            "without resuming")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or ["it is cut short"])[0]
        raise CheckpointError(f"{file} is no whole training state ({reason[:200]}): delete it and "
                              "start the run anew") from error
    missing = [part for part in PARTS if not isinstance(content, dict) or part not in content]
    if missing:
        raise CheckpointError(f"{file} is no training state of this version (it lacks "
                              f"{', '.join(missing)}): start the run anew in another folder")
    return content


def _check_same(file: Path, saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    differing = []
    for name in {**saved, **current}:
        before, now = saved.get(name, "none"), current.get(name, "none")
        if before != now:
            is_short = len(before) + len(now) < 60
            differing.append(f"{name} ({before}, now {now})" if is_short else name)
    if differing:
        raise LongspanError(f"{file} comes from a run with another {', '.join(differing)}: resume "
                            "with the same, or start a new run in another folder")


def _num_numbers(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
