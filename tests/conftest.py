"""Shared fixtures: a seed that is printed, poisoned memory, one tolerance."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

from longspan.ops import reference
from longspan.ops.types import PagedKV, QueryRotary

hypothesis.settings.register_profile(
    "longspan", derandomize=True, database=None, deadline=None, max_examples=60)
hypothesis.settings.load_profile("longspan")


def pytest_configure(config: pytest.Config) -> None:
    """Triton reads this once, when it is first imported: kernels are interpreted, on any machine,
    except in a run of the GPU tests alone (``-m gpu``)."""
    os.environ["TRITON_INTERPRET"] = "0" if config.option.markexpr == "gpu" else "1"


torch.set_num_threads(1)  # shapes here are small; threads only wait for each other

SEED = 20250126
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""RMS of the error over RMS of the reference (docs/numerics.md)."""
POISONED_PACKAGES = ("tests/ops/", "tests/attention/")


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS error over RMS reference, fp64. Infinities must agree in place and sign."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite]), "infinities differ"
    actual, expected = actual[~infinite], expected[~infinite]
    assert actual.isfinite().all(), "NaN or infinity in the result"
    error = (actual - expected).square().mean().sqrt()
    return float(error / expected.square().mean().sqrt().clamp(min=1e-30))


def assert_close(
    actual: Tensor, expected: Tensor, what: str = "result", dtype: torch.dtype | None = None
) -> None:
    """The project's one comparison; the tolerance follows the dtype that was computed in
    (default: that of ``actual``)."""
    ratio, limit = error_ratio(actual, expected), TOLERANCE[dtype or actual.dtype]
    assert ratio <= limit, f"{what}: error ratio {ratio:.2e} above {limit:.0e}"


def write_rotated(cache: PagedKV, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Store keys that are rotated already, and their values: k, v [T, K, D]; slots [T]. The means
    of every touched block are computed anew."""
    half = k.shape[-1] // 2
    still = QueryRotary(cos=torch.ones(1, half, device=k.device), stride=1, clamp=1,
                        sin=torch.zeros(1, half, device=k.device), inv_freq=torch.zeros(half))
    reference.store_kv(cache, k, v, torch.zeros_like(slots), slots,
                       torch.unique(slots // cache.k.shape[1]), still)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the tested op runs."""
    return str(request.param)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Every test starts from the same seed, shown when it fails."""
    print(f"seed {SEED}: torch.manual_seed before {request.node.name}")
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def poisoned_memory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Uninitialised tensors hold NaN in tests of attention and ops, so that an element that is
    read before it is written, or never written, fails loudly."""
    if request.node.nodeid.startswith(POISONED_PACKAGES):
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
                            (Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    yield


def _poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = function(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        return tensor

    return poisoned
