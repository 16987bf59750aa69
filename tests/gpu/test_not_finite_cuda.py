"""NaN on a GPU, from prompts to decode graphs and bursts: it ends the request that has it, not the
device, whose kernels select keys and read tokens by what was computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.engine.front.llm import LLM
from longspan.engine.request import SamplingParams
from longspan.errors import RequestFailedError
from tests.engine.front.test_failures import SICK, poison, poison_embedding, side_by_side

pytestmark = pytest.mark.gpu

DCA = {"chunk_size": 2048, "local_size": 256, "original_max_position_embeddings": 2048}
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
LENGTHS = (30, 600, 9000)


def load(path: Path, attention: str) -> LLM:
    return LLM(str(path), device="cuda", memory_gib=4.0, max_model_len=10_000, attention=attention,
               prefill_chunk_len=4096)


def prompt(length: int, *sick: int) -> list[int]:
    """Tokens, the sick one at some places."""
    return [SICK if place in sick else 7 * place % 70 for place in range(length)]


def checkpoint(path: Path, change: Any) -> Path:
    return poison(path, change, hidden_size=256, max_position_embeddings=16_384,
                  dual_chunk_attention_config=DCA)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_others_go_on(tmp_path: Path, attention: str) -> None:
    path = checkpoint(tmp_path, poison_embedding)
    with load(path, attention) as llm:
        alone = llm.generate([prompt(LENGTHS[0])], PARAMS)[0].token_ids  # fills no block: no cache
        for length in LENGTHS:
            for place in (0, length // 3, length - 1):
                with pytest.raises(RequestFailedError, match="not finite numbers"):
                    llm.generate([prompt(length, place)], PARAMS)
        asked = [(prompt(40, 3), PARAMS), *((prompt(length), PARAMS) for length in LENGTHS)]
        failed, *others = side_by_side(llm, asked)
        assert isinstance(failed, RequestFailedError)
        assert [len(tokens) for tokens in others] == [PARAMS.max_tokens] * len(LENGTHS)
        assert llm.generate([prompt(LENGTHS[0])], PARAMS)[0].token_ids == alone


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [
    "model.norm.weight", "model.layers.0.self_attn.k_proj.bias",
    "model.layers.1.mlp.down_proj.weight"])
def test_one_broken_weight(tmp_path: Path, name: str, number: float, attention: str) -> None:
    path = checkpoint(tmp_path, lambda weights: weights[name].view(-1)[5:6].fill_(number))
    with load(path, attention) as llm:
        for length in LENGTHS:
            with pytest.raises(RequestFailedError, match="not finite numbers"):
                llm.generate([prompt(length)], PARAMS)
    torch.cuda.synchronize()  # nothing was read out of range
