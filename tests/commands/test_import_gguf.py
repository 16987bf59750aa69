"""`longspan import`: tiny GGUF files of each family become checkpoints that compute the same."""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType, dequantize, quantize
from safetensors.torch import load_file
from torch import Tensor

from longspan.cli import run_command
from longspan.commands.import_gguf import dca_config, import_gguf
from longspan.config import ModelConfig
from longspan.engine.front.llm import LLM
from longspan.engine.request import SamplingParams
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import LongspanError, MissingDependencyError
from longspan.model import gguf as reading
from longspan.model import safetensors_writer
from tests.model.test_qwen2 import MAX_DIFFERENCE, load, run_planned

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCAB, WINDOW = 64, 96, 4, 2, 2, 264, 256
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
# Each case: GGUF architecture, transformers' name, and what its config says beyond the others'.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2": ("qwen2", "Qwen2", {}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32}),
    "llama": ("llama", "Llama", {}),
    "llama-biases": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", "Llama", {"rope_parameters": LLAMA3}),
    "linear-rope": ("llama", "Llama", {"rope_parameters": LINEAR}),
}
CONTROL_TOKENS = ("<|im_end|>", "<|begin_of_text|>", "<|endoftext|>", "<|im_start|>")
BASE = 257
"""Id of the first control token: behind 256 bytes and one merged pair."""
TEMPLATE = ("{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.content }}"
            "<|im_end|>{% endfor %}")
Usage = namedtuple("Usage", "total used free")


def make_model(kind: str, tied: bool = False) -> Any:
    """A random transformers model whose weights are bf16 numbers, so that none is rounded."""
    import transformers

    _, name, facts = KINDS[kind]
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**{
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "max_position_embeddings": WINDOW, "tie_word_embeddings": tied,
        "attn_implementation": "eager", **facts})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_small = parameter_name.endswith(("bias", "norm.weight"))
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.3 if is_small else 0.15)
            parameter.copy_(parameter.bfloat16())
    return model


def stored_tensors(kind: str, model: Any) -> dict[str, Any]:
    """The model's weights as llama.cpp stores them, by GGUF name, fp32."""
    tensors: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        if KINDS[kind][0] == "llama" and heads is not None:  # LlamaModel.permute
            values = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
            values = values.swapaxes(1, 2).reshape(tensor.shape)
        tensors[reading.gguf_name(name)] = np.ascontiguousarray(values)
    if model.config.tie_word_embeddings:
        del tensors["output.weight"]
    if kind == "llama3-rope":
        plain = 10_000.0 ** (-np.arange(0, HIDDEN // HEADS, 2) / (HIDDEN // HEADS))
        tensors["rope_freqs.weight"] = np.array(
            [llama3_divisor(2 * np.pi / value) for value in plain], dtype=np.float32)
    return tensors


def llama3_divisor(wavelength: float) -> float:
    """As convert_hf_to_gguf.py writes it for Llama 3.1."""
    if wavelength < 8192 / 4:
        return 1.0
    if wavelength > 8192:
        return 8.0
    share = (8192 / wavelength - 1) / 3
    return 1 / ((1 - share) / 8 + share)


def begin(path: Path, kind: str, *, keys: dict[str, Any] | None = None, **options: Any) -> Any:
    """A writer with the metadata of a model; ``keys`` adds further ones of the architecture."""
    arch, _, facts = KINDS[kind]
    writer = GGUFWriter(path, arch, **options)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(WINDOW)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    if "head_dim" in facts:
        writer.add_key_length(facts["head_dim"])
        writer.add_value_length(facts["head_dim"])
    if kind == "linear-rope":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    for key, value in (keys or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{arch}.{key}", value)
    return writer


def add_tokenizer(writer: Any, pre: str = "qwen2", model: str = "gpt2") -> None:
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", *CONTROL_TOKENS]
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * BASE + [3] * len(CONTROL_TOKENS))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(BASE)
    writer.add_bos_token_id(BASE + 1)
    writer.add_chat_template(TEMPLATE)


def add_sentencepiece(writer: Any) -> None:
    """As of Llama 2 and Mistral: pieces with scores, no merges, a space before the text."""
    pieces = ["\u2581", *"abdehlortw", "he", "ll", "\u2581a", "lo", "hello"]
    others = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*others[: VOCAB - len(pieces)], *pieces]
    plain = range(len(tokens) - len(pieces), len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(idx) if idx in plain else 0.0 for idx in range(len(tokens))])
    writer.add_token_types([1 if idx in plain else 2 if idx == 0 else 3 if idx < 3 else 6
                            for idx in range(len(tokens))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def finish(writer: Any, tensors: dict[str, Any], types: dict[str, Any] | None = None) -> None:
    """Write the tensors, those that ``types`` names quantised."""
    for name, values in tensors.items():
        kind = (types or {}).get(name)
        stored = values if kind is None else quantize(values, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(
    path: Path, kind: str = "qwen2", *, tied: bool = False, types: dict[str, Any] | None = None,
    changed: dict[str, Any] | None = None, keys: dict[str, Any] | None = None,
    pre: str = "qwen2", **options: Any,
) -> Any:
    """A file of a random model, which is returned. ``changed``: tensors to replace, None: to leave
    out."""
    model = make_model(kind, tied)
    tensors = stored_tensors(kind, model) | (changed or {})
    writer = begin(path, kind, keys=keys, **options)
    add_tokenizer(writer, pre)
    finish(writer, {name: each for name, each in tensors.items() if each is not None}, types)
    return model


def token_ids(count: int) -> Tensor:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(5))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors")
            for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_original(tmp_path, kind, tied):
    """By longspan and, from the same directory, by transformers."""
    from transformers import AutoModelForCausalLM

    model, out = write_gguf(tmp_path / "x.gguf", kind, tied=tied), tmp_path / "out"
    import_gguf(tmp_path / "x.gguf", out)
    original = model.state_dict()
    stored = weights_of(out)
    assert original.keys() - stored.keys() == ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(stored[name].float(), original[name]) for name in stored)
    ids = token_ids(60)
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
        again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids[None]).logits[0]
    assert expected.std() > 0.3
    logits = run_planned(load(out), ids, prompt_len=50, seed=0)
    assert (logits - expected).abs().max() <= MAX_DIFFERENCE
    assert (again - expected).abs().max() <= MAX_DIFFERENCE


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_quantised_rows(tmp_path, kind):
    """Rows are quantised one by one, so that their order in the file does not matter."""
    types = {"blk.0.attn_q.weight": "Q8_0", "blk.1.attn_k.weight": "Q4_0",
             "blk.0.ffn_down.weight": "Q5_0", "blk.1.ffn_up.weight": "F16",
             "blk.1.attn_v.weight": "BF16", "token_embd.weight": "Q4_0"}
    kinds = {name: GGMLQuantizationType[each] for name, each in types.items()}
    model = write_gguf(tmp_path / "x.gguf", kind, types=kinds)
    import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    stored = weights_of(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        each = kinds.get(reading.gguf_name(name), GGMLQuantizationType.F32)
        read = torch.tensor(dequantize(quantize(tensor.numpy(), each), each))
        assert torch.equal(stored[name], read.bfloat16()), name
        is_exact = each.name in ("F32", "F16", "BF16")
        assert torch.equal(stored[name].float(), tensor) is is_exact, name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["provenance"]["source"] == "x.gguf"
    assert config["provenance"]["quantisation"]["Q4_0"] == 2


def test_pieces_do_not_change_the_file(tmp_path, monkeypatch):
    write_gguf(tmp_path / "x.gguf", "llama",
               types={"blk.0.attn_q.weight": GGMLQuantizationType.Q8_0})
    import_gguf(tmp_path / "x.gguf", tmp_path / "whole")
    monkeypatch.setattr(reading, "PIECE_ELEMENTS", 3 * HIDDEN)
    import_gguf(tmp_path / "x.gguf", tmp_path / "pieces")
    name = "model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "pieces" / name).read_bytes()


def test_a_large_model_comes_in_shards(tmp_path, monkeypatch):
    model, out = write_gguf(tmp_path / "x.gguf"), tmp_path / "out"
    monkeypatch.setattr(safetensors_writer, "MAX_SHARD_BYTES", 40_000)
    import_gguf(tmp_path / "x.gguf", out)
    shards = sorted(file.name for file in out.glob("*.safetensors"))
    count = f"{len(shards):05}"
    assert len(shards) > 2 and shards[-1] == f"model-{count}-of-{count}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * p.numel() for p in model.parameters())
    ids = token_ids(20)
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    assert (run_planned(load(out), ids, 15, 0) - expected).abs().max() <= MAX_DIFFERENCE


@pytest.mark.parametrize(("embedding", "head"), [
    ("Q4_0", "Q8_0"), ("Q8_0", "Q4_0"), ("F16", "Q8_0")])
def test_a_head_in_other_bits_is_the_embedding(tmp_path, embedding, head):
    """The import keeps the finer one of two copies."""
    matrix = torch.randn(VOCAB, HIDDEN).numpy()
    types = {"token_embd.weight": GGMLQuantizationType[embedding],
             "output.weight": GGMLQuantizationType[head]}
    write_gguf(tmp_path / "x.gguf", types=types,
               changed={"token_embd.weight": matrix, "output.weight": matrix})
    import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    stored = weights_of(tmp_path / "out")
    assert ModelConfig.from_dir(tmp_path / "out").tie_word_embeddings
    assert "lm_head.weight" not in stored
    finer = GGMLQuantizationType["F16" if embedding == "F16" else "Q8_0"]
    expected = torch.tensor(dequantize(quantize(matrix, finer), finer)).bfloat16()
    assert torch.equal(stored["model.embed_tokens.weight"], expected)


@pytest.mark.parametrize("change", ["nothing", "one-row", "slightly"])
def test_exact_heads_are_tied_only_if_equal(tmp_path, change):
    matrix = torch.randn(VOCAB, HIDDEN).numpy()
    head = matrix.copy()
    if change == "one-row":
        head[VOCAB - 1] *= 2
    if change == "slightly":
        head *= 1.01
    write_gguf(tmp_path / "x.gguf", changed={"token_embd.weight": matrix, "output.weight": head})
    import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert ModelConfig.from_dir(tmp_path / "out").tie_word_embeddings is (change == "nothing")
    assert ("lm_head.weight" in weights_of(tmp_path / "out")) is (change != "nothing")


def test_a_split_model_from_any_of_its_parts(tmp_path):
    write_gguf(tmp_path / "whole.gguf")
    write_gguf(tmp_path / "part.gguf", split_max_tensors=8)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 2
    import_gguf(tmp_path / "whole.gguf", tmp_path / "whole")
    for given in (parts[0], parts[-1]):
        out = tmp_path / given.stem
        import_gguf(given, out)
        expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
        assert (out / "model.safetensors").read_bytes() == expected
        provenance = json.loads((out / "config.json").read_text())["provenance"]
        assert provenance["source"] == parts[0].name


def test_parts_that_do_not_belong_together(tmp_path):
    write_gguf(tmp_path / "x.gguf", split_max_tensors=16)
    parts = sorted(tmp_path.glob("x-*.gguf"))
    shutil.copy(parts[0], tmp_path / "renamed.gguf")
    fails(tmp_path / "renamed.gguf", f"part of a model in {len(parts)} files; give them their name")
    backup = parts[1].read_bytes()
    shutil.copy(parts[0], parts[1])
    fails(parts[0], "is in another part too; these parts do not belong together")
    parts[1].unlink()
    fails(parts[0], f"1 of {len(parts)} parts are missing, the first is {parts[1].name}")
    parts[1].write_bytes(backup)
    import_gguf(parts[0], tmp_path / "out")


def fails(file: Path, text: str) -> None:
    """The import ends with one line, and nothing is left."""
    out = file.parent / "refused"
    with pytest.raises(LongspanError) as caught:
        import_gguf(file, out)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert not out.exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"changed": {"blk.1.ffn_up.weight": None}}, "1 of 27 tensors are missing, the first is "),
    ({"changed": {"token_embd.weight": None}}, "token_embd.weight is missing"),
    ({"changed": {"blk.0.ffn_gate_inp.weight": np.zeros((4, HIDDEN), np.float32)}},
     "1 unknown tensors, the first is blk.0.ffn_gate_inp.weight"),
    ({"changed": {"blk.0.ffn_up.weight": np.zeros((INNER + 1, HIDDEN), np.float32)}},
     "blk.0.ffn_up.weight has shape [97, 64], its metadata asks for [96, 64]"),
    ({"changed": {"blk.0.ffn_up.weight": np.full((INNER, HIDDEN), np.nan, np.float32)}},
     "blk.0.ffn_up.weight holds NaN or infinity"),
    ({"changed": {"blk.0.ffn_up.weight": np.zeros((INNER, HIDDEN), np.int8)}},
     "blk.0.ffn_up.weight is of type I8, which cannot be read"),
    ({"keys": {"expert_count": 8}}, "qwen2.expert_count is 8, which is not supported"),
    ({"keys": {"attention.sliding_window": 4096}}, "attention.sliding_window is 4096"),
    ({"keys": {"rope.scaling.type": "yarn"}}, "rope.scaling.type is 'yarn', which is"),
    ({"keys": {"rope.dimension_count": 8}}, "rope.dimension_count is 8, the head dim 16 is needed"),
    ({"keys": {"attention.value_length": 8}}, "attention.value_length is 8, the head dim 16"),
    ({"pre": "poro-chat"}, "tokenizer.ggml.pre is 'poro-chat', which is not supported"),
    ({"kind": "llama", "changed": {"rope_freqs.weight": np.full(8, 2.0, np.float32)}},
     "rope_freqs.weight is not Llama 3's scaling"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_what_has_no_counterpart_is_refused_by_name(tmp_path, options, text):
    write_gguf(tmp_path / "x.gguf", **options)
    fails(tmp_path / "x.gguf", text)


@pytest.mark.parametrize(("arch", "text"), [
    ("qwen2moe", "architecture 'qwen2moe' is not supported; supported: qwen2, qwen3, llama"),
    ("qwen2", "qwen2: embedding_length is None, a positive integer is needed")])
def test_other_architectures_and_files_without_facts(tmp_path, arch, text):
    finish(GGUFWriter(tmp_path / "x.gguf", arch), {"a": np.zeros((2, 2), np.float32)})
    fails(tmp_path / "x.gguf", text)


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.05, 0.3, 0.9, 0.9999])
def test_a_truncated_file(tmp_path, share):
    write_gguf(tmp_path / "x.gguf")
    content = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[: max(6, int(share * len(content)))])
    fails(tmp_path / "x.gguf", "truncated or damaged")


@pytest.mark.parametrize(("content", "text"), [
    (b"", "not a GGUF file, it begins with b''"),
    (b"PK\x03\x04 a zip", "not a GGUF file, it begins with b'PK"),
    (b"version https://git-lfs.github.com/spec/v1", "a git-lfs pointer"),
    (None, "cannot be read (No such file or directory)")])
def test_no_gguf_file(tmp_path, content, text):
    if content is not None:
        (tmp_path / "x.gguf").write_bytes(content)
    fails(tmp_path / "x.gguf", text)


def test_an_unknown_tensor_type(tmp_path):
    write_gguf(tmp_path / "x.gguf")
    content = bytearray((tmp_path / "x.gguf").read_bytes())
    name = b"token_embd.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8
    assert content[place : place + 4] == bytes(4)  # F32
    content[place] = 200
    (tmp_path / "x.gguf").write_bytes(content)
    fails(tmp_path / "x.gguf", "holds tensors of type 200, which is not known; take a file of")


def test_a_directory_in_use(tmp_path):
    write_gguf(tmp_path / "x.gguf")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".part").mkdir()  # of a run that was killed
    import_gguf(tmp_path / "x.gguf", out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(LongspanError, match="out is not empty; name a new folder"):
        import_gguf(tmp_path / "x.gguf", out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    with pytest.raises(LongspanError, match=r"x\.gguf is a file; name a folder"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "x.gguf")


def test_a_disk_that_is_too_small_or_fills_up(tmp_path, monkeypatch):
    write_gguf(tmp_path / "x.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 1000))
        fails(tmp_path / "x.gguf", "are free there; make room")
    pieces = reading.PlannedTensor.pieces

    def full(tensor: reading.PlannedTensor) -> Any:
        if "layers.1" in tensor.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pieces(tensor)

    monkeypatch.setattr(reading.PlannedTensor, "pieces", full)
    fails(tmp_path / "x.gguf", "cannot be written (No space left on device")


def test_dca_runs_beyond_the_window(tmp_path):
    write_gguf(tmp_path / "x.gguf")
    import_gguf(tmp_path / "x.gguf", tmp_path / "out", dca=True)
    config = ModelConfig.from_dir(tmp_path / "out")
    assert config.dca is not None and config.max_position_embeddings == 4 * WINDOW
    assert (config.dca.chunk_size, config.dca.original_max_position_embeddings) == (WINDOW, WINDOW)
    llm = LLM(str(tmp_path / "out"), device="cpu", num_threads=1)
    (answer,) = llm.generate("a" * (2 * WINDOW), SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(answer.token_ids) == 3


@pytest.mark.parametrize("kind", ["llama-biases", "linear-rope"])
def test_the_engine_answers_as_the_original(tmp_path, kind):
    model, out = write_gguf(tmp_path / "x.gguf", kind), tmp_path / "out"
    import_gguf(tmp_path / "x.gguf", out)
    prompt = "What was written on the third page of the book?"
    ids = list(Tokenizer(out).encode(prompt))
    expected = list[int]()
    for _ in range(12):
        with torch.no_grad():
            expected.append(int(model(torch.tensor([ids + expected])).logits[0, -1].argmax()))
    llm = LLM(str(out), device="cpu", num_threads=1)
    (answer,) = llm.generate(prompt, SamplingParams(max_tokens=12, ignore_eos=True))
    assert list(answer.token_ids) == expected


@pytest.mark.parametrize(("window", "local"), [
    (262_144, 8192), (131_072, 4096), (32_768, 1024), (8192, 256), (2048, 128), (1_010_000, 31_568),
    (100, 3)])
def test_dca_chunks_are_whole_blocks(window, local):
    config = dca_config(window)["dual_chunk_attention_config"]
    assert config["local_size"] == local
    assert window < 256 or (window - local) % 128 == 0


def test_tokens_that_begin_and_end(tmp_path):
    """The file says nothing of a BOS; its kind of splitting does, as in llama.cpp."""
    write_gguf(tmp_path / "x.gguf", "llama", pre="llama-bpe")
    import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out")
    assert tokenizer.eos_token_ids == {BASE, BASE + 2}
    bos = BASE + 1
    assert list(tokenizer.encode("a", add_special_tokens=True)).count(bos) == 1
    assert list(tokenizer.encode("a")).count(bos) == 0
    chat = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert list(tokenizer.encode(chat)) == [
        bos, BASE + 3, *tokenizer.encode("hi"), BASE]
    assert json.loads(tokenizer.to_json())["model"]["ignore_merges"]


def test_a_sentencepiece_vocabulary(tmp_path):
    writer = begin(tmp_path / "x.gguf", "llama")
    add_sentencepiece(writer)
    finish(writer, stored_tensors("llama", make_model("llama")))
    import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out")
    ids = tokenizer.encode("a he wall", add_special_tokens=True)
    assert [tokenizer.piece(idx) for idx in ids] == [
        "<s>", "\u2581a", "\u2581", "he", "\u2581", "w", "a", "ll"]
    assert tokenizer.decode(ids) == "a he wall"
    assert tokenizer.eos_token_ids == {2}


@pytest.mark.parametrize(("pre", "text", "pieces"), [
    ("qwen2", "Cafe\u0301 12", ["C", "a", "f", "Ã", "©", "Ġ", "1", "2"]),
    ("smollm", "a12", ["a", "1", "2"]), ("gpt-2", "the", ["th", "e"])])
def test_text_is_split_as_the_original_splits_it(tmp_path, pre, text, pieces):
    write_gguf(tmp_path / "x.gguf", pre=pre)
    import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out")
    assert [tokenizer.piece(idx) for idx in tokenizer.encode(text)] == pieces
    raw = json.loads(tokenizer.to_json())["pre_tokenizer"]
    assert ("Digits" in str(raw)) is (pre == "smollm")


def test_the_command(tmp_path, capsys):
    write_gguf(tmp_path / "x.gguf")
    arguments = ["import", str(tmp_path / "x.gguf"), str(tmp_path / "out")]
    assert run_command(arguments) == 0
    assert "Qwen2ForCausalLM, up to 256 tokens; longspan generate" in capsys.readouterr().err
    assert run_command(arguments) == 2
    assert re.fullmatch(r"error: .*out is not empty; name a new folder\n", capsys.readouterr().err)


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"gguf is not installed: pip install 'longsp"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "out")
