"""Bytes of a model's weights, by the forms that its matrices are held in. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from longspan.config import ModelConfig
from longspan.weight_form import FOR_CPUS, WeightForm, WeightForms


class Matrix(NamedTuple):
    """Matrices of a layer that memory holds as one."""

    form: WeightForm
    sizes: tuple[int, ...]
    """Outputs of each."""
    in_features: int
    copies: int = 1
    """Equal ones, one under the other: experts."""

    @property
    def num_weights(self) -> int:
        """Numbers in all of them."""
        return self.copies * sum(self.sizes) * self.in_features

    def num_bytes(self, element: int) -> int:
        """Bytes of all of them."""
        return self.form.num_bytes(self.sizes * self.copies, self.in_features, element)


def layer_matrices(model: ModelConfig, forms: WeightForms, layer_idx: int) -> Iterator[Matrix]:
    """Yield the matrices of a layer that may be held in other forms than plain."""
    hidden, within = model.hidden_size, forms.within(f"model.layers.{layer_idx}")
    heads, attention = model.num_heads * model.head_dim, within.within("self_attn")
    keys = model.num_kv_heads * model.head_dim
    yield _matrix(attention.of("q_proj", "k_proj", "v_proj"), (heads, keys, keys), hidden)
    yield _matrix(attention.of("o_proj"), (hidden,), heads)
    experts, mlp = model.experts, within.within("mlp")
    widths = [(mlp, model.intermediate_size, 1)]
    if experts is not None and experts.is_routed(layer_idx):
        widths = [(mlp.within("experts").within("0"), experts.expert_size, experts.num_held)]
        if experts.shared_size:
            widths.append((mlp.within("shared_expert"), experts.shared_size, 1))
    for names, width, copies in widths:
        yield _matrix(names.of("gate_proj", "up_proj"), (width, width), hidden, copies)
        yield _matrix(names.of("down_proj"), (hidden,), width, copies)


def _matrix(form: WeightForm, sizes: tuple[int, ...], in_features: int, copies: int = 1) -> Matrix:
    return Matrix(form.fitting(sizes, in_features, copies), sizes, in_features, copies)


def weights_bytes(model: ModelConfig, forms: WeightForms, element: int) -> int:
    """Bytes of all weights. ``element``: bytes of a plain number."""
    matrices = [matrix for idx in range(model.num_layers)
                for matrix in layer_matrices(model, forms, idx)]
    plain = sum(matrix.num_weights for matrix in matrices)
    held = sum(matrix.num_bytes(element) for matrix in matrices)
    if forms.vocabulary.kind != "plain":  # rows of the embedding, and the head, tied or not
        plain += (1 if model.tie_word_embeddings else 2) * model.vocab_size * model.hidden_size
        held += 2 * forms.vocabulary.num_bytes((model.vocab_size,), model.hidden_size, element)
    return (model.num_parameters - plain) * element + held


def routed_bytes(model: ModelConfig, forms: WeightForms, element: int) -> int:
    """Bytes of all layers' routed experts."""
    if model.experts is None:
        return 0
    return sum(matrix.num_bytes(element) for idx in range(model.num_layers)
               if model.experts.is_routed(idx)
               for matrix in layer_matrices(model, forms, idx) if matrix.copies > 1)


def scratch_bytes(
    model: ModelConfig, forms: WeightForms, element: int, device_type: str
) -> int:
    """Bytes that quantised weights, but those for CPUs, take where they are made plain for a
    product: the largest matrix's, and on GPUs, where no product of experts reads what they are held
    in, all experts' of a layer."""
    if forms.form.kind in ("plain", *FOR_CPUS):
        return 0
    layers = [list(layer_matrices(model, forms, idx)) for idx in range(model.num_layers)]
    found = [matrix.num_weights // matrix.copies for matrices in layers for matrix in matrices
             if matrix.form.kind not in ("plain", *FOR_CPUS)]
    if device_type != "cpu":
        found += [sum(matrix.num_weights for matrix in matrices if matrix.copies > 1
                      and matrix.form.kind in ("fp8-blocks", "int4")) for matrices in layers]
    return max(found, default=0) * element
