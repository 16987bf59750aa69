"""Log-probabilities of answers before preference training: computed once, kept in a file."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longspan.errors import LongspanError
from longspan.files.whole import make_folder, replace_file
from longspan.train.objective import AnswerLogProbs
from longspan.train.samples import SampleFeed
from longspan.train.step import Step

REFERENCE_FILE = "reference.npz"
SAVE_EVERY_S = 60.0


def load_reference(file: Path, identity: str, count: int) -> np.ndarray:
    """Return what an earlier call has computed, fp32 [count], NaN where it had not come to.

    Raises `LongspanError` when the file belongs to other pairs or another model.
    """
    if not file.is_file():
        return np.full(count, np.nan, np.float32)
    try:
        with np.load(file) as content:
            values, made_from = content["values"], str(content["identity"])
    except (OSError, ValueError, KeyError) as error:
        raise LongspanError(f"{file} is not whole ({error}): delete it and repeat the "
                            "command") from None
    if made_from != identity or len(values) != count:
        raise LongspanError(f"{file} belongs to other pairs or another model: repeat with "
                            "those, or name another folder")
    return np.asarray(values, np.float32)


def compute_reference(
    step: Step, feed: SampleFeed, values: np.ndarray, file: Path, identity: str,
    is_over: Callable[[], bool],
) -> Tensor | None:
    """Fill in what is missing, fp32 [samples]; None when ``is_over`` came first. What was computed
    is then in the file."""
    by_length: dict[int, list[int]] = {}
    for group in range(len(values) // feed.together):
        if np.isnan(values[group * feed.together : (group + 1) * feed.together]).any():
            by_length.setdefault(feed.row_length(0, group), []).append(group)
    saved_s = time.perf_counter()
    for length, groups in sorted(by_length.items()):
        size = feed.groups_in_step(length)
        for start in range(0, len(groups), size):
            if is_over():
                _save(step, file, values, identity)
                return None
            chosen = groups[start : start + size]
            found = _logprobs(step, feed, length, chosen)
            for number, group in enumerate(chosen):
                rows = slice(number * feed.together, (number + 1) * feed.together)
                values[group * feed.together : (group + 1) * feed.together] = found[rows]
            if step.world.any(time.perf_counter() - saved_s > SAVE_EVERY_S):
                _save(step, file, values, identity)
                saved_s = time.perf_counter()
    _save(step, file, values, identity)
    return torch.from_numpy(values)


@torch.no_grad()
def _logprobs(step: Step, feed: SampleFeed, length: int, groups: list[int]) -> np.ndarray:
    """Log-probabilities of all rows of a step, [rows]."""
    world = step.world
    batch = feed.batch(0, length, groups)
    found = torch.zeros(len(batch.ids), device=world.device)
    own = world.rows(batch).to(world.device)
    first = world.rank // world.context.size * len(own.ids)
    with step.using(AnswerLogProbs()):
        at_once = max(1, feed.tokens_per_step // 4 // length)
        for start in range(0, len(own.ids), at_once):
            part = step.targets(own).rows(start, start + at_once)
            _, sums = step(part, torch.ones((), device=world.device))
            found[first + start : first + start + len(part.ids)] = sums["logprobs"]
    # All processes that share a row have its whole sum.
    return (world.sum(found) / world.context.size).cpu().numpy()


def _save(step: Step, file: Path, values: np.ndarray, identity: str) -> None:
    if step.world.is_first:
        make_folder(file.parent)
        replace_file(file, lambda out: np.savez(out, values=values, identity=np.array(identity)))
    step.world.barrier()
