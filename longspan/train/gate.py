"""Retrieval gates: exact answers to questions about a document, measured on bf16 weights.

The document is prefilled once; each question is then asked directly behind it. An answer counts
when the argmax is right at every one of its tokens, which is what greedy decoding needs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.train.model import CausalLM, rope_tables


@dataclass(frozen=True, slots=True)
class Haystack:
    """One document and the questions asked behind it."""

    document: list[int]
    questions: list[tuple[list[int], list[int]]]
    """(question ids, answer ids) each."""


@dataclass(slots=True)
class Score:
    """Counts of a gate."""

    num_questions: int = 0
    num_exact: int = 0
    num_tokens: int = 0
    num_token_hits: int = 0

    @property
    def exact(self) -> float:
        """Share of questions answered exactly."""
        return self.num_exact / max(1, self.num_questions)

    @property
    def token_accuracy(self) -> float:
        """Share of answer tokens predicted."""
        return self.num_token_hits / max(1, self.num_tokens)


class DocumentCache:
    """Keys and values of one document; later tokens see it and are not kept."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the document's keys and values followed by the new ones, each [B, K, S, D]."""
        if layer_idx not in self.layers:
            self.layers[layer_idx] = (key, value)
            return key, value
        old_key, old_value = self.layers[layer_idx]
        return torch.cat((old_key, key), 2), torch.cat((old_value, value), 2)


def _forward(model: CausalLM, ids: Tensor, start: int, cache: DocumentCache) -> Tensor:
    """Hidden states [1, T, M] of ids [1, T] at positions from ``start`` behind the cache."""
    hidden = model.model.embed_tokens(ids)
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)
    cos, sin = rope_tables(model, positions)
    # transformers up to 5.23 calls it by another name
    names = inspect.signature(type(model.model.layers[0]).forward).parameters
    held = {"cache" if "cache" in names else "past_key_values": cache}
    for layer in model.model.layers:
        out = layer(hidden, attention_mask=None, position_embeddings=(cos, sin), **held)
        hidden = (out[0] if isinstance(out, tuple) else out).to(hidden.dtype)
    return model.model.norm(hidden)


def inference_copy(model: CausalLM) -> CausalLM:
    """Copy the model as it will be shipped: bf16 on CUDA, unchanged precision elsewhere."""
    clone = copy.deepcopy(model).eval()
    if clone.model.embed_tokens.weight.is_cuda:
        rotary = copy.deepcopy(model.model.rotary_emb)
        clone = clone.to(torch.bfloat16)
        clone.model.rotary_emb = rotary
    return clone


def run_gate(
    haystacks: Mapping[str, Callable[[int], Iterable[Haystack]]], lengths: Sequence[int],
    model: CausalLM,
) -> dict[str, Any]:
    """Return shares of exact answers in documents of each length.

    Args:
        haystacks: by what is asked for, makes documents of about a given number of tokens.
    """
    torch.backends.cuda.enable_flash_sdp(True)
    clone = inference_copy(model)
    result: dict[str, Any] = {}
    for length in lengths:
        for name, documents in haystacks.items():
            score = score_haystacks(clone, documents(length))
            result |= {f"{name}_{length}": score.exact, f"{name}_n_{length}": score.num_questions,
                       f"{name}_digits_{length}": score.token_accuracy}
    return result


@torch.no_grad()
def score_haystacks(model: CausalLM, haystacks: Iterable[Haystack]) -> Score:
    """Ask every question of every haystack; ``model`` is used as it is (see inference_copy)."""
    score = Score()
    device = model.model.embed_tokens.weight.device
    for haystack in haystacks:
        cache = DocumentCache()
        _forward(model, torch.tensor([haystack.document], device=device), 0, cache)
        for question, answer in haystack.questions:
            hits = _answer_hits(model, cache, len(haystack.document), question, answer)
            score.num_questions += 1
            score.num_exact += all(hits)
            score.num_tokens += len(hits)
            score.num_token_hits += sum(hits)
    return score


def _answer_hits(
    model: CausalLM, cache: DocumentCache, start: int, question: Sequence[int],
    answer: Sequence[int],
) -> list[bool]:
    device = model.model.embed_tokens.weight.device
    ids = torch.tensor([[*question, *answer]], device=device)
    hidden = _forward(model, ids[:, :-1], start, cache)[0, len(question) - 1 :]
    predicted = model.lm_head(hidden).argmax(-1)
    return (predicted == ids[0, len(question) :]).tolist()
