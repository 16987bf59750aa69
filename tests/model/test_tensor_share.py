"""What a rank has of each layer: the parts of stored tensors, and what cannot be cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longspan.attention.ranks import RankGroup
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.device.memory import DeviceMemory
from longspan.engine.setup.engine_plan import ResolvedEngine
from longspan.errors import CheckpointError, LongspanError
from longspan.model.linear import Cut, Stored, dense
from longspan.model.safetensors_files import SafetensorsReader, stored_tensors
from longspan.model.stored_forms import cut_stored
from longspan.model.tensor_share import TensorShare, check_share, joined, model_of_rank
from longspan.ops import quantize_blocks, quantize_int4, quantize_rows
from longspan.weight_form import PLAIN_FORMS, WeightForm, WeightForms

MODEL = ModelConfig(
    architecture="Qwen2ForCausalLM", vocab_size=1024, hidden_size=512, intermediate_size=1536,
    num_layers=2, num_heads=16, num_kv_heads=4, head_dim=64, rms_norm_eps=1e-6, rope_theta=1e6,
    max_position_embeddings=8192, tie_word_embeddings=False, attention_bias=True, qk_norm=False)
BLOCKS = WeightForms(WeightForm("fp8-blocks"))


@pytest.mark.parametrize("cut", [
    Cut(rows=((1, 3), (5, 6))), Cut(columns=((0, 2), (3, 4))),
    Cut(rows=((2, 4),), columns=((1, 3),)), Cut()], ids=str)
def test_a_part_alone_is_read_from_a_file(cut: Cut, tmp_path: Path) -> None:
    whole = torch.arange(28, dtype=torch.bfloat16).view(7, 4)
    save_file({"x": whole, "y": whole + 100}, tmp_path / "model.safetensors")
    rows = torch.cat([whole[start:stop] for start, stop in cut.rows or ((0, 7),)])
    expected = torch.cat([rows[:, start:stop] for start, stop in cut.columns or ((0, 4),)], 1)
    with SafetensorsReader() as reader:
        assert torch.equal(reader.read(stored_tensors(tmp_path)["x"], cut), expected)
        assert torch.equal(reader.read(stored_tensors(tmp_path)["y"], cut), expected + 100)


def test_of_a_vector_and_a_stack_the_first_axis_is_cut(tmp_path: Path) -> None:
    save_file({"bias": torch.arange(6.0), "stack": torch.arange(24.0).view(4, 3, 2)},
              tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    with SafetensorsReader() as reader:
        assert reader.read(stored["bias"], Cut(rows=((4, 6),))).tolist() == [4, 5]
        found = reader.read(stored["stack"], Cut(rows=((1, 3),)))
    assert torch.equal(found, torch.arange(24.0).view(4, 3, 2)[1:3])


def test_a_file_that_has_shrunk_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(64, 64)}, file)
    entry = stored_tensors(tmp_path)["x"]
    file.write_bytes(file.read_bytes()[:-100])
    with SafetensorsReader() as reader, pytest.raises(CheckpointError, match="truncated"):
        reader.read(entry, Cut(columns=((32, 64),)))


@pytest.mark.parametrize("cut", [
    Cut(rows=((0, 128), (256, 384))), Cut(columns=((128, 384),))], ids=["rows", "columns"])
@pytest.mark.parametrize("kind", ["plain", "blocks", "row scales", "int4"])
def test_parts_of_quantised_matrices_are_those_of_the_plain_numbers(kind: str, cut: Cut) -> None:
    torch.manual_seed(1)
    plain = torch.randn(512, 384)
    forms: dict[str, Stored] = {
        "plain": plain, "blocks": quantize_blocks(plain), "row scales": quantize_rows(plain),
        "int4": quantize_int4(plain, 128)}
    stored = forms[kind]
    whole = dense(stored)
    expected = torch.cat([whole[start:stop] for start, stop in cut.rows or ((0, 512),)])
    expected = torch.cat([expected[:, start:stop] for start, stop in cut.columns or ((0, 384),)], 1)
    assert torch.equal(dense(cut_stored(stored, cut)), expected)


def test_ranges_that_touch_are_joined() -> None:
    assert joined(((0, 2), (2, 4), (6, 8))) == ((0, 4), (6, 8))


def test_every_weight_is_one_ranks() -> None:
    """But what all of them have."""
    for size in (1, 2, 4):
        shares = [TensorShare.of(RankGroup(rank, size), MODEL, None) for rank in range(size)]
        assert sorted(head for share in shares for head in share.kv_heads[0]) == [0, 1, 2, 3]
        part = shares[0].model
        assert (part.num_heads, part.num_kv_heads, part.intermediate_size) == (
            16 // size, 4 // size, 1536 // size)
        assert part.kv_elements_per_token * size == MODEL.kv_elements_per_token


@pytest.mark.parametrize(("model", "forms", "size", "words"), [
    (MODEL, PLAIN_FORMS, 8, "4 KV heads, which 8 ranks cannot share equally; use tensor_parallel "
                            "4, or context_parallel"),
    (replace(MODEL, intermediate_size=1537), PLAIN_FORMS, 2,
     "1537 columns of its MLP, which 2 ranks cannot share equally; use context_parallel"),
    (MODEL, WeightForms(WeightForm("int4", 128, has_order=True)), 2, "orders inputs by activation"),
    (replace(MODEL, intermediate_size=1280), BLOCKS, 4,
     "a matrix of 256 x 512 is left to a rank, which cuts blocks of fp8"),
    (replace(MODEL, intermediate_size=1408), WeightForms(WeightForm("int4", 128)), 2,
     "a matrix of 512 x 704 is left to a rank, which cuts blocks of int4"),
])
def test_what_cannot_be_cut_is_refused_in_one_line(
    model: ModelConfig, forms: WeightForms, size: int, words: str,
) -> None:
    with pytest.raises(LongspanError) as caught:
        check_share(model, forms, size)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"tensor_parallel {size}: ")


def test_what_can_be_cut_is_not_refused() -> None:
    for forms in (PLAIN_FORMS, BLOCKS, WeightForms(WeightForm("int4", 128)),
                  WeightForms(WeightForm("fp8-rows"))):
        check_share(MODEL, forms, 2)
    check_share(replace(MODEL, num_kv_heads=3, num_heads=6), PLAIN_FORMS, 1)


def test_memory_is_planned_for_one_rank(tmp_path: Path) -> None:
    def plan(size: int) -> ResolvedEngine:
        return ResolvedEngine.of(MODEL, EngineConfig(
            model="x", device="cpu", weights="random", tensor_parallel=size, max_model_len=8192,
            prefill_chunk_len=1024, max_num_requests=4), path=tmp_path, plan=None,
            device=DeviceMemory(total_bytes=2**33, free_bytes=2**33))

    one, two = plan(1).memory, plan(2).memory
    assert two.kv_bytes_per_token * 2 == one.kv_bytes_per_token
    vocabulary = 2 * MODEL.vocab_size * MODEL.hidden_size * 4
    assert two.weights_bytes - vocabulary == pytest.approx(
        (one.weights_bytes - vocabulary) / 2, rel=0.01)
    assert model_of_rank(MODEL, 1) is MODEL
