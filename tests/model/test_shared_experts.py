"""Experts that ranks share out whole: the parts add up to the layer, in every form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longspan.attention.ranks import RankGroup
from longspan.bench.shapes import Shape
from longspan.config import ModelConfig
from longspan.errors import LongspanError
from longspan.expert_config import ExpertConfig
from longspan.model.experts import RoutedMLP
from longspan.model.int8 import has_int8_product
from longspan.model.linear import Stored, Target
from longspan.model.stored_forms import cut_stored
from longspan.model.tensor_share import TensorShare, check_share, model_of_rank
from longspan.ops import quantize_rows
from longspan.weight_form import PLAIN_FORMS, FormKind, WeightForm, WeightForms
from longspan.weight_sizes import layer_matrices, weights_bytes
from tests.conftest import assert_close

HIDDEN = 256
CONFIG = ExpertConfig(num_experts=5, num_chosen=3, expert_size=384, shared_size=512)
"""Experts that no two ranks share equally, of a width that blocks of 128 divide and its half does
not; the shared one's half and quarter are whole blocks."""
MODEL = replace(Shape.make("qwen3-30b-a3b").model, hidden_size=HIDDEN, experts=CONFIG)
FORMS: tuple[FormKind, ...] = ("plain", "fp8-rows", "fp8-blocks", "int4")


def build(kind: FormKind, size: int, rank: int) -> RoutedMLP:
    model = model_of_rank(MODEL, size)
    assert model.experts is not None
    return RoutedMLP(HIDDEN, model.experts, dtype=torch.float32, device="cpu", rank=rank,
                     forms=WeightForms(WeightForm(kind, 128)))


def fill(
    mlp: RoutedMLP, stored: dict[str, Tensor], kind: FormKind, size: int, rank: int,
) -> set[str]:
    """Fill a rank's part; returns the names of what it took."""
    prefix = "model.layers.0.mlp."
    targets: dict[str, Target] = {
        prefix + name: target for name, target in mlp.weight_targets().items()}
    if size > 1:
        targets = TensorShare.of(RankGroup(rank, size), MODEL, None).cut_targets(targets)
    for name, target in targets.items():
        whole: Stored = stored[name.removeprefix(prefix)]
        assert target.shape == whole.shape, name
        if kind == "fp8-rows" and target.form is not None and "shared" in name:
            assert isinstance(whole, Tensor)
            whole = quantize_rows(whole)  # as from a checkpoint: a part's own scales are others
        target.fill(whole if target.cut is None else cut_stored(whole, target.cut))
    return {name.removeprefix(prefix) for name in targets}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", [*FORMS, *["int8-rows"] * has_int8_product()])
def test_parts_of_all_ranks_add_up_to_the_layer(kind: FormKind, size: int) -> None:
    torch.manual_seed(3)
    alone = build(kind, 1, 0)
    stored = {name: torch.randn(target.shape) * 0.1
              for name, target in alone.weight_targets().items()}
    fill(alone, stored, kind, 1, 0)
    parts = [build(kind, size, rank) for rank in range(size)]
    taken = [fill(part, stored, kind, size, rank) for rank, part in enumerate(parts)]
    assert set().union(*taken) == stored.keys()
    experts = [name for names in taken for name in names if name.startswith("experts.")]
    assert len(experts) == len(set(experts)) == 3 * CONFIG.num_experts  # each is one rank's
    x = torch.randn(33, HIDDEN)
    wanted, found = alone(x), sum(part(x) for part in parts)
    assert isinstance(found, Tensor)
    near = 0.01 if kind == "int8-rows" else 1e-5  # activations of parts are rounded otherwise
    assert (found - wanted).norm() < near * wanted.norm()


def test_experts_that_are_stored_together_are_cut_too() -> None:
    whole = torch.randn(5, 2 * 384, HIDDEN), torch.randn(5, HIDDEN, 384)
    for rank, (start, stop) in enumerate(((0, 2), (2, 5))):
        mlp = build("plain", 2, rank)
        for stored, target in zip(whole, mlp.experts.whole_targets(), strict=True):
            assert target.shape == stored.shape and target.cut is not None
            part = cut_stored(stored, target.cut)
            assert isinstance(part, Tensor) and torch.equal(part, stored[start:stop])
            target.fill(part)
        for stored, held in zip(whole, (mlp.experts.gate_up_proj, mlp.experts.down_proj),
                                strict=True):
            assert isinstance(held, Tensor)
            assert_close(held, stored[start:stop])


def test_choices_of_other_ranks_weigh_nothing() -> None:
    experts = build("plain", 2, 1).experts  # 2, 3 and 4
    weights, chosen = experts.here(torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[4, 1, 2]]))
    assert chosen.tolist() == [[2, 3, 0]]
    assert torch.equal(weights, torch.tensor([[0.5, 0.0, 0.2]]))


def test_memory_counts_the_experts_of_one_rank() -> None:
    """At most: where they are not as many on all ranks, those of the rank with most."""
    model = Shape.make("qwen3-30b-a3b").model
    for size, count in ((2, 64), (4, 32)):
        part = model_of_rank(model, size)
        (routed, *_) = (matrix for matrix in layer_matrices(part, PLAIN_FORMS, 0)
                        if matrix.copies > 1)
        assert (routed.copies, routed.sizes) == (count, (768, 768))
        assert part.num_routed_parameters * size == model.num_routed_parameters
        layers = model.num_layers * model.hidden_size * (model.experts or CONFIG).num_experts
        vocabulary = 2 * model.vocab_size * model.hidden_size + layers  # and routers
        own, whole = (weights_bytes(one, PLAIN_FORMS, 2) - 2 * vocabulary
                      for one in (part, model))
        assert own == pytest.approx(whole / size, rel=1e-3)
    assert [len(CONFIG.held_by(0)), CONFIG.num_held] == [5, 5]
    uneven = replace(CONFIG, num_sharers=4)
    assert [list(uneven.held_by(rank)) for rank in range(4)] == [[0], [1], [2], [3, 4]]
    assert uneven.num_held == 2


@pytest.mark.parametrize(("model", "kind", "size", "words"), [
    (MODEL, "fp8-blocks", 2, None),
    (replace(MODEL, intermediate_size=77), "plain", 2, None),  # no layer has an MLP
    (Shape.make("qwen3-30b-a3b").model, "fp8-blocks", 4, None),
    (replace(MODEL, experts=replace(CONFIG, num_experts=3)), "plain", 4,
     "the model has 3 experts in a layer, fewer than ranks; use as many at the most"),
    (replace(MODEL, experts=replace(CONFIG, shared_size=386)), "plain", 4,
     "386 columns of the expert that every token takes, which 4 ranks cannot share equally; use "
     "tensor_parallel 2, or context_parallel"),
    (replace(MODEL, experts=replace(CONFIG, shared_size=384)), "fp8-blocks", 2,
     "a matrix of 192 x 256 is left to a rank, which cuts blocks of fp8"),
    (replace(MODEL, intermediate_size=77, experts=replace(
        CONFIG, dense_layers=frozenset({1}))), "plain", 2, "77 columns of its MLP"),
])
def test_what_ranks_can_share(
    model: ModelConfig, kind: FormKind, size: int, words: str | None,
) -> None:
    forms = WeightForms(WeightForm(kind, 128))
    if words is None:
        return check_share(model, forms, size)
    with pytest.raises(LongspanError) as caught:
        check_share(model, forms, size)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    return None
