"""Saved states: whole or not there, whatever the disk does, and no debris left behind."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from longspan.errors import CheckpointError, LongspanError
from longspan.files.whole import replace_file, replaced_checkpoint
from longspan.train.phases import Phase
from longspan.train.state import Progress, load_state, load_weights, save_state

PHASES = [Phase(name="a", seq_len=128, rope_theta=1e4, num_tokens=256, learning_rate=1e-3,
                tokens_per_step=128)]
FINGERPRINT = {"seed": "0"}


def save(folder: Path, value: float, size: int = 8) -> None:
    model = torch.nn.Linear(size, size)
    torch.nn.init.constant_(model.weight, value)
    save_state(folder, model, torch.optim.AdamW(model.parameters()),
               Progress(trained_phase=0), PHASES, FINGERPRINT)


def load(folder: Path) -> float:
    model = torch.nn.Linear(8, 8)
    load_state(folder, model, torch.optim.AdamW(model.parameters()), FINGERPRINT)
    return model.weight[0, 0].item()


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_state_before_and_no_debris(tmp_path: Path) -> None:
    save(tmp_path, 1.0)
    with full_disk(100_000), pytest.raises(LongspanError) as caught:
        save(tmp_path, 2.0, size=512)
    assert re.fullmatch(r".*state.pt cannot be written \(File too large; .* MiB free\): .*",
                        str(caught.value))
    assert load(tmp_path) == 1.0
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
    save(tmp_path, 3.0)
    assert load(tmp_path) == 3.0


@pytest.mark.parametrize("damage", [
    lambda whole: whole[: len(whole) // 2],
    lambda whole: whole[:-10],
    lambda whole: b"",
    lambda whole: b"no state at all",
])
def test_a_state_that_is_not_whole_is_refused(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    save(tmp_path, 1.0)
    file = tmp_path / "state.pt"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match="state.pt is no whole training state") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_of_other_content_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="lacks optimizer, progress, phases, fingerprint"):
        load(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1.0, size=16)
    with pytest.raises(CheckpointError, match="another model \\(272 numbers, not 72\\)") as caught:
        load_weights(tmp_path, torch.nn.Linear(8, 8))
    assert "\n" not in str(caught.value)


def test_an_interrupted_write_leaves_the_file_before(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_text("old")

    def interrupted(out: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(file, interrupted)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text("old")
    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "debris").write_text("of a crash")
    with full_disk(10), pytest.raises(LongspanError, match="cannot be written"), \
            replaced_checkpoint(tmp_path) as folder:
        (folder / "config.json").write_text("new")
        (folder / "model.safetensors").write_text("much too long")
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == dict.fromkeys(
        ("config.json", "model.safetensors", "README.md"), "old")
    with replaced_checkpoint(tmp_path) as folder:
        for name in ("config.json", "model-1.safetensors", "model.safetensors.index.json"):
            (folder / name).write_text("new")
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {
        "config.json": "new", "model-1.safetensors": "new", "model.safetensors.index.json": "new",
        "README.md": "old"}
