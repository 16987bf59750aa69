"""The chunked weighted loss equals the plain one, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longspan.train import loss as loss_module
from longspan.train.loss import chunk_len, token_nll, weighted_cross_entropy
from longspan.train.model import build_model, hidden_states, set_rope


@pytest.mark.parametrize("chunk", [7, 64])
def test_equals_plain_cross_entropy(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(loss_module, "chunk_len", lambda *_: chunk)
    torch.manual_seed(0)
    hidden = torch.randn(30, 16, requires_grad=True)
    head = torch.randn(50, 16, requires_grad=True)
    targets, weights = torch.randint(0, 50, (30,)), torch.rand(30) * 5
    ours, nll, hit = weighted_cross_entropy(hidden, head, targets, weights / weights.sum())
    (3 * ours).backward()
    grads = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    plain_nll = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    plain = (plain_nll * weights).sum() / weights.sum()
    (3 * plain).backward()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(nll, plain_nll)
    torch.testing.assert_close(grads[0], hidden.grad)
    torch.testing.assert_close(grads[1], head.grad)
    for plainly, value in zip(token_nll(hidden, head, targets), (nll, hit), strict=True):
        torch.testing.assert_close(plainly, value)
    assert hit.tolist() == ((hidden @ head.T).argmax(-1) == targets).tolist()


def test_chunks_stay_small_with_large_vocabularies() -> None:
    assert chunk_len(4096) == 16_384
    for size in (65_536, 151_936, 262_144):
        assert chunk_len(size) % 128 == 0 and 128 <= chunk_len(size) <= (1 << 28) // size


def test_training_path_equals_plain_transformers() -> None:
    model = build_model(
        vocab_size=300, num_layers=2, hidden_size=64, num_heads=2, num_kv_heads=1,
        intermediate_size=96)
    set_rope(model, 1e6, 256)
    ids = torch.randint(0, 300, (2, 128))
    hidden = hidden_states(model, ids)[:, :-1].flatten(0, 1)
    head = model.model.embed_tokens.weight
    targets = ids[:, 1:].flatten()
    weights = torch.full((len(targets),), 1 / len(targets))
    ours = weighted_cross_entropy(hidden, head, targets, weights)[0]
    ours.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation("eager")
    plain = model(ids, labels=ids).loss
    plain.backward()
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_recompute_gives_the_same_gradients() -> None:
    model = build_model(
        vocab_size=300, num_layers=2, hidden_size=64, num_heads=2, num_kv_heads=1,
        intermediate_size=96)
    ids = torch.randint(0, 300, (1, 128))
    grads = []
    for recompute in (False, True):
        model.zero_grad()
        hidden_states(model, ids, recompute=recompute).square().sum().backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1])
