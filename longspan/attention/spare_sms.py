"""Matrix products that leave some of a GPU's SMs to an exchange between ranks.

cuBLAS' kernels on Hopper hold every SM until they end, so NCCL's, which needs some of its own,
would begin when the product that it should run beside has ended. PyTorch's knob for that is private
and may go: without it all is computed as well, one thing after the other. It acts on products with
a bias, as Qwen2.5's projections have one.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

EXCHANGE_SMS = 16
"""SMs of an exchange: an eighth of an H200's. Enough for half of what NVLink carries, and a product
takes an eighth longer."""

Knob = Callable[[int | None], None]
_set_carveout: Knob | None = getattr(torch._C, "_set_sm_carveout_experimental", None)


@contextmanager
def spare_sms(count: int) -> Iterator[None]:
    """Leave so many SMs out of the matrix products that are launched here; 0: none."""
    if not count or _set_carveout is None:
        yield
        return
    _quieten(_set_carveout)
    _set_carveout(count)
    try:
        yield
    finally:
        _set_carveout(None)


@functools.cache
def _quieten(knob: Knob) -> None:
    """Turn it once before it is used: it warns the first time that it may go."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting the SM carveout")
        knob(0)
    knob(None)
