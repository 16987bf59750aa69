"""How near a way of attending comes to dense attention: rows out of what was measured of each text.

The reference is dense attention with the same positions. Dense attention with another chunking is
the floor: what differs there is rounding, and nothing below it means anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean
from typing import Any

import numpy as np

from longspan.eval.stats import Estimate, nats_estimate, wilson_interval
from longspan.eval.tasks.perplexity import position_bins

ALL = "all"
"""The task of rows over all texts of a length."""
Heads = Sequence[Sequence[Sequence[float]]]
"""[layers][heads] of (mean, border of the worst twentieth, worst)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFidelity:
    """One text in one arm, beside dense attention."""

    task: str
    num_tokens: int
    """As asked for."""
    index: int
    attention: str
    nats: np.ndarray
    """[T - 1] of every token but the first, given those before it."""
    dense_nats: np.ndarray
    """[T - 1] the same of the reference."""
    kl: np.ndarray
    """[R] nats, of the next token's distribution at the chosen positions."""
    agrees: np.ndarray
    """[R] the most probable token is the same."""
    answer_len: int = 0
    """Tokens of the right answer at the text's end; the last of R positions predict them."""
    density: float | None = None
    recalls: Heads = ()
    errors: Heads = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nats_more(self) -> float:
        """Nats a token more than dense."""
        return float((self.nats - self.dense_nats).mean())


def chosen_positions(num_tokens: int, count: int, answer_len: int = 0) -> np.ndarray:
    """Choose the tokens, but for the first, whose predictions are compared: all of them if they are
    few; else the last half of ``count``, the answer among them, and as many evenly over the rest.

    Returns token places, ascending, [R].
    """
    if num_tokens - 1 <= count:
        return np.arange(1, num_tokens)
    last = max(count // 2, answer_len)
    spread = np.linspace(1, num_tokens - last - 1, max(1, count - last)).round().astype(int)
    return np.concatenate([np.unique(spread), np.arange(num_tokens - last, num_tokens)])


def fidelity_rows(model: str, texts: Iterable[TextFidelity]) -> list[dict[str, Any]]:
    """Summarise texts in rows: one for each length, arm and task, and one for all tasks together
    that names the worst task and the worst head."""
    rows = []
    for _, cell in groupby(
            sorted(texts, key=_cell_order), key=lambda text: (text.num_tokens, text.attention)):
        every = list(cell)
        own = [_row(model, list(group), task) for task, group in groupby(
            every, key=lambda text: text.task)]
        rows += own
        if len(own) > 1:
            worst = max(own, key=lambda row: row["kl"])
            rows.append({**_row(model, every, ALL),
                         "worst_task": {"task": worst["task"], "kl": worst["kl"]}})
    return rows


def _cell_order(text: TextFidelity) -> tuple[int, str, str, int]:
    return text.num_tokens, text.attention, text.task, text.index


def _row(model: str, texts: Sequence[TextFidelity], task: str) -> dict[str, Any]:
    kl = np.concatenate([text.kl for text in texts])
    agrees = np.concatenate([text.agrees for text in texts])
    low, high = wilson_interval(float(agrees.sum()), len(agrees))
    first = texts[0]
    densities = [text.density for text in texts if text.density is not None]
    return {
        "model": model, "task": task, "num_tokens": first.num_tokens,
        "attention": first.attention, "n": len(texts), "num_positions": len(kl),
        **_named("kl", nats_estimate([float(text.kl.mean()) for text in texts]), 6),
        "kl_p99": _short(float(np.quantile(kl, 0.99))), "kl_max": _short(float(kl.max())),
        **_answer_kl(texts),
        "top1": round(float(agrees.mean()), 5), "top1_low": round(low, 5),
        "top1_high": round(high, 5),
        **_named("nats", nats_estimate([float(text.nats.mean()) for text in texts]), 5),
        **_named("nats_more", nats_estimate([text.nats_more for text in texts]), 6),
        "density": round(fmean(densities), 4) if densities else None,
        "nats_by_position": _by_position(texts), **_heads(texts), **first.about}


def _named(name: str, found: Estimate, digits: int) -> dict[str, Any]:
    """Return a mean and its interval, which a single text does not have."""
    low, high = (found.low, found.high) if found.method else (None, None)
    return {name: _short(found.mean, digits), f"{name}_low": _short(low, digits),
            f"{name}_high": _short(high, digits)}


def _short(value: float | None, digits: int = 6) -> Any:
    """Round to so many significant digits: floors are many orders below what is measured."""
    return None if value is None else float(f"{value:.{digits}g}")


def _answer_kl(texts: Sequence[TextFidelity]) -> dict[str, Any]:
    """Return the mean over the tokens of right answers, where texts end in them."""
    parts = [text.kl[-text.answer_len:] for text in texts if text.answer_len]
    return {"answer_kl": _short(float(np.concatenate(parts).mean())),
            "num_answer_tokens": sum(map(len, parts))} if parts else {}


def _by_position(texts: Sequence[TextFidelity]) -> dict[str, float]:
    """Return mean nats in bins of positions that double in length, of texts that reach them."""
    found: dict[str, list[float]] = {}
    for text in texts:
        for low, high in position_bins(len(text.nats)):
            full = low and high == len(text.nats) and high < 2 * low
            if not full:  # the last bin of a text is shorter, and no other text's
                found.setdefault(f"{low}-{high}", []).append(float(text.nats[low:high].mean()))
    return {name: round(fmean(values), 4) for name, values in found.items()}


def _heads(texts: Sequence[TextFidelity]) -> dict[str, Any]:
    """Return recall and output error by head, of the mean over texts, and the worst head."""
    sparse = [text for text in texts if len(text.recalls)]
    if not sparse:
        return {}
    recalls = np.mean([text.recalls for text in sparse], 0)  # [layers, heads, 3]
    errors = np.mean([text.errors for text in sparse], 0)
    layer, head = np.unravel_index(recalls[..., 0].argmin(), recalls.shape[:2])
    return {
        "recall": round(float(recalls[..., 0].mean()), 4),
        "recall_p5": round(float(np.quantile(recalls[..., 0], 0.05)), 4),
        "output_error": round(float(errors[..., 0].mean()), 4),
        "worst_head": {"layer": int(layer), "head": int(head),
                       "recall": round(float(recalls[layer, head, 0]), 4),
                       "output_error": round(float(errors[layer, head, 0]), 4)},
        "recall_by_head": recalls[..., 0].round(4).tolist(),
        "output_error_by_head": errors[..., 0].round(4).tolist()}
