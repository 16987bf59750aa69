"""Every fault of a checkpoint is one line that names the file, the numbers and the remedy."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from longspan.attention.rope import build_rotary
from longspan.config import ModelConfig, Quantization
from longspan.engine.front.llm import LLM
from longspan.errors import CheckpointError, MissingDependencyError
from longspan.model import CausalLM, build_model, load_weights, resolve_checkpoint, weights
from longspan.model.int8 import Int8Linear
from longspan.model.linear import PlainLinear

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 31, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}


def checkpoint_tensors(tied: bool = False) -> dict[str, torch.Tensor]:
    """Names and shapes as Hugging Face stores them, distinct values throughout."""
    shapes = {"model.embed_tokens.weight": (31, 16), "model.norm.weight": (16,)}
    if not tied:
        shapes["lm_head.weight"] = (31, 16)
    for idx in range(2):
        layer = {
            "self_attn.q_proj.weight": (16, 16), "self_attn.q_proj.bias": (16,),
            "self_attn.k_proj.weight": (8, 16), "self_attn.k_proj.bias": (8,),
            "self_attn.v_proj.weight": (8, 16), "self_attn.v_proj.bias": (8,),
            "self_attn.o_proj.weight": (16, 16), "mlp.gate_proj.weight": (24, 16),
            "mlp.up_proj.weight": (24, 16), "mlp.down_proj.weight": (16, 24),
            "input_layernorm.weight": (16,), "post_attention_layernorm.weight": (16,),
        }
        shapes |= {f"model.layers.{idx}.{name}": shape for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with config.json and one sound safetensors file."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(checkpoint_tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def shard(path: Path) -> None:
    """Split the single file into two shards and an index."""
    tensors = load_file(path / "model.safetensors")
    names, weight_map = list(tensors), {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").unlink()


def load(path: Path, layers: range = range(2), dtype: torch.dtype = torch.float32) -> CausalLM:
    config = ModelConfig.from_dir(path)
    rotary = build_rotary(head_dim=4, rope_theta=1e4, max_model_len=64, dca=None)
    model = build_model(
        config, layers=layers, rotary=rotary, plan=None, dtype=dtype, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # whatever is not loaded shows
    load_weights(model, path)
    return model


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors of the single file; dots of names are written __."""
    tensors = load_file(path / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path / "model.safetensors")


def message(path: Path, **kwargs) -> str:
    """The one-line error that loading raises."""
    with pytest.raises(CheckpointError) as caught:
        load(path, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_filled(model: CausalLM, tensors: dict[str, torch.Tensor]) -> None:
    for parameter in model.parameters():
        assert parameter.isfinite().all()
    attention = model.layers[0].self_attn
    names = [f"model.layers.{model.layer_range.start}.self_attn.{n}_proj" for n in "qkv"]
    for kind in ("weight", "bias"):
        expected = torch.cat([tensors[f"{name}.{kind}"] for name in names])
        assert torch.equal(getattr(attention.qkv_proj, kind), expected)


def head(model):
    """Weights of the head."""
    assert isinstance(model.lm_head, PlainLinear)
    return model.lm_head.weight


def test_single_file_fills_every_weight(checkpoint):
    model = load(checkpoint)
    assert_filled(model, checkpoint_tensors())
    assert torch.equal(head(model), checkpoint_tensors()["lm_head.weight"])


def test_shards_fill_every_weight(checkpoint):
    shard(checkpoint)
    assert_filled(load(checkpoint), checkpoint_tensors())


@pytest.mark.parametrize("layers", [range(0, 1), range(1, 2)], ids=["first", "last"])
def test_stage_loads_its_own_layers(checkpoint, layers):
    assert_filled(load(checkpoint, layers), checkpoint_tensors())


def test_last_stage_of_a_tied_model_gets_the_embedding_as_its_head(checkpoint):
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    tensors = checkpoint_tensors(tied=True)
    save_file(tensors, checkpoint / "model.safetensors")
    model = load(checkpoint, range(1, 2))
    assert torch.equal(head(model), tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_types_are_converted(checkpoint, stored):
    tensors = {name: tensor.to(stored) for name, tensor in checkpoint_tensors().items()}
    save_file(tensors, checkpoint / "model.safetensors")
    assert_filled(load(checkpoint), {name: tensor.float() for name, tensor in tensors.items()})
    narrow = load(checkpoint, dtype=torch.bfloat16)
    assert_filled(narrow, {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_redundant_tensors_are_accepted(checkpoint):
    rewrite(checkpoint, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(2))
    load(checkpoint)


@pytest.mark.parametrize("layers", [range(2), range(1, 2)], ids=["whole", "last stage"])
def test_a_stored_head_of_tied_embeddings_must_be_the_embedding(checkpoint, layers):
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    embedding = checkpoint_tensors()["model.embed_tokens.weight"]
    text = message(checkpoint, layers=layers)
    assert text.startswith(f"{checkpoint / 'model.safetensors'}: lm_head.weight differs from")
    assert "set tie_word_embeddings to false" in text
    rewrite(checkpoint, lm_head__weight=embedding.bfloat16())
    assert "lm_head.weight differs from" in message(checkpoint, layers=layers)
    rewrite(checkpoint, lm_head__weight=embedding.clone())
    assert torch.equal(head(load(checkpoint, layers)), embedding)


def test_empty_directory(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json there"):
        ModelConfig.from_dir(tmp_path)


def test_no_safetensors(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert message(checkpoint) == f"{checkpoint}: no safetensors file there"


def test_pytorch_bin_is_named(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"x")
    assert "no safetensors file there (pytorch_model.bin found" in message(checkpoint)


def test_shards_without_index(checkpoint):
    shard(checkpoint)
    (checkpoint / "model.safetensors.index.json").unlink()
    assert "2 safetensors files (model-00001-of-00002.safetensors, ...)" in message(checkpoint)


def test_missing_shard(checkpoint):
    shard(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    text = message(checkpoint)
    assert "1 of 2 shards are missing, the first is model-00002-of-00002.safetensors" in text


def test_tensor_missing_from_its_shard(checkpoint):
    shard(checkpoint)
    file = checkpoint / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    gone = sorted(tensors)[0]
    save_file({name: tensors[name] for name in tensors if name != gone}, file)
    text = message(checkpoint)
    assert f"{file.name}: 1 tensors named in model.safetensors.index.json are missing" in text
    assert gone in text


def test_tensor_in_two_shards(checkpoint):
    shard(checkpoint)
    first, second = sorted(checkpoint.glob("model-*.safetensors"))
    both = load_file(first) | load_file(second)
    name = sorted(load_file(first))[0]
    save_file(load_file(second) | {name: both[name] + 1}, second)
    text = message(checkpoint)
    assert text.startswith(f"{second}: {name} is in {first.name} too")


def test_tensor_in_another_shard_than_the_index_says(checkpoint):
    shard(checkpoint)
    file = checkpoint / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "model-00002-of-00002.safetensors"
    file.write_text(json.dumps(index))
    assert f"model-00002-of-00002.safetensors: 1 tensors named in {file.name} are missing, the " \
           f"first is {name}" in message(checkpoint)


def test_every_file_is_opened_once_for_its_header_and_once_for_its_tensors(
    checkpoint, monkeypatch,
):
    shard(checkpoint)
    opened, original = [], Path.open

    def counting(self: Path, *args, **kwargs):
        opened.append(self.name)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counting)
    monkeypatch.setattr(safetensors, "safe_open", None)  # nobody opens them another way
    load(checkpoint)
    assert Counter(name for name in opened if name.endswith(".safetensors")) == {
        "model-00001-of-00002.safetensors": 2, "model-00002-of-00002.safetensors": 2}


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": []}', "{", '{"weight_map": {"a": 1}}'])
def test_corrupt_index(checkpoint, text):
    shard(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in message(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -4], ids=str)
def test_truncated_file(checkpoint, keep):
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    text = message(checkpoint)
    assert text.startswith(f"{file}: ")
    if len(data[:keep]) >= 8:
        assert f"truncated, {len(data[:keep]):,} of " in text
    if keep == -4:
        assert f"truncated, {len(data) - 4:,} of {len(data):,} bytes" in text


@pytest.mark.parametrize("header", [
    pytest.param(b"", id="empty"),
    pytest.param(b"[]", id="list"),
    pytest.param(b"{", id="cut"),
    pytest.param(b"\xff\xfe", id="not-utf8"),
    pytest.param(b'{"a": 1}', id="entry-is-a-number"),
    pytest.param(b'{"a": {"dtype": "F32"}}', id="no-shape"),
    pytest.param(b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}', id="shape"),
    pytest.param(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', id="one-offset"),
    pytest.param(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": "xy"}}', id="offsets"),
    pytest.param(b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},'
                 b' "a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}', id="twice"),
    pytest.param(b'{"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]},'
                 b' "b": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}', id="shared"),
    pytest.param(b'{"a": {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]}}', id="gap"),
    pytest.param(b'{"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}', id="surplus"),
])
def test_corrupt_header(checkpoint, header):
    file = checkpoint / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    assert message(checkpoint) == f"{file}: corrupt safetensors header; fetch the file again"


def test_absurd_header_length(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(b"\xff" * 64)
    assert "corrupt safetensors header" in message(checkpoint)


def test_header_whose_offsets_do_not_fit_its_shapes(checkpoint):
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    changed = data.replace(b'"shape":[24,16]', b'"shape":[16,24]', 1)
    assert changed != data
    file.write_bytes(changed)
    assert "has shape [16, 24], config.json asks for [24, 16]" in message(checkpoint)


def test_offsets_that_the_reader_refuses(checkpoint):
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data + b"surplus")
    assert message(checkpoint).startswith(f"{file}: ")


def test_bytes_that_do_not_fit_the_shape(checkpoint):
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    header_len = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + header_len])
    header["model.norm.weight"]["dtype"] = "BF16"
    changed = json.dumps(header).encode()
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + header_len:])
    assert message(checkpoint) == f"{file}: corrupt safetensors header; fetch the file again"


def test_lfs_pointer(checkpoint):
    (checkpoint / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "a git-lfs pointer" in message(checkpoint)


def test_missing_tensors(checkpoint):
    rewrite(checkpoint, model__layers__1__mlp__up_proj__weight=None, model__norm__weight=None)
    text = message(checkpoint)
    assert "2 of 27 tensors are missing, the first is model.layers.1.mlp.up_proj.weight" in text


def test_other_stages_tensors_are_not_asked_for(checkpoint):
    rewrite(checkpoint, model__layers__1__mlp__up_proj__weight=None, model__norm__weight=None)
    load(checkpoint, layers=range(1))


def test_wrong_shape(checkpoint):
    rewrite(checkpoint, model__layers__0__self_attn__k_proj__weight=torch.ones(4, 16))
    text = message(checkpoint)
    assert "model.layers.0.self_attn.k_proj.weight has shape [4, 16]" in text
    assert text.endswith("config.json asks for [8, 16]")


def test_quantised_tensor(checkpoint):
    rewrite(checkpoint, model__norm__weight=torch.ones(16, dtype=torch.int8))
    assert "model.norm.weight is stored as I8; only F32, F16, BF16" in message(checkpoint)


@pytest.mark.parametrize("name", [
    "model.layers.2.input_layernorm.weight", "model.layers.0.self_attn.o_proj.bias",
    "visual.patch.weight", "model.layers.0.mlp.experts.0.up_proj.weight",
])
def test_unknown_tensor(checkpoint, name):
    rewrite(checkpoint, **{name.replace(".", "__"): torch.ones(16)})
    text = message(checkpoint, layers=range(1, 2))
    assert f"1 unknown tensors, the first is {name}" in text


def test_nothing_is_written_before_the_checks(checkpoint):
    rewrite(checkpoint, surplus=torch.ones(1))
    config = ModelConfig.from_dir(checkpoint)
    rotary = build_rotary(head_dim=4, rope_theta=1e4, max_model_len=64, dca=None)
    model = build_model(config, layers=range(2), rotary=rotary, plan=None,
                        dtype=torch.float32, device="cpu")
    for parameter in model.parameters():
        parameter.fill_(3.0)
    with pytest.raises(CheckpointError):
        load_weights(model, checkpoint)
    assert all((parameter == 3.0).all() for parameter in model.parameters())


def test_resolve_directory(checkpoint):
    assert resolve_checkpoint(str(checkpoint)) == checkpoint


def test_resolve_file(checkpoint):
    with pytest.raises(CheckpointError, match="is a file; name the directory"):
        resolve_checkpoint(str(checkpoint / "config.json"))


@pytest.mark.parametrize("name", ["/no/such/place", "no-such-place", "./a/b", "a/b/c", ""])
def test_resolve_no_directory(name):
    with pytest.raises(CheckpointError, match="no such directory; name a directory, a hub id"):
        resolve_checkpoint(name)


def test_resolve_bundled(tmp_path, monkeypatch, checkpoint):
    monkeypatch.setattr(weights, "package_files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="bundled model is not in this installation"):
        resolve_checkpoint("nano")
    shutil.copytree(checkpoint, tmp_path / "nano")
    assert resolve_checkpoint("nano") == tmp_path / "nano"


def fake_download(monkeypatch, outcome) -> list[dict]:
    """Stand in for the hub: raise or return `outcome`."""
    import huggingface_hub

    calls: list[dict] = []

    def snapshot_download(name: str, **kwargs) -> str:
        calls.append({"name": name, **kwargs})
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_hub_id_downloads_only_what_is_read(monkeypatch, checkpoint):
    calls = fake_download(monkeypatch, str(checkpoint))
    assert resolve_checkpoint("Qwen/Qwen2.5-7B-Instruct-1M") == checkpoint
    assert calls[0]["name"] == "Qwen/Qwen2.5-7B-Instruct-1M"
    assert not any(pattern.endswith(".bin") for pattern in calls[0]["allow_patterns"])
    assert "*.safetensors" in calls[0]["allow_patterns"]
    resolve_checkpoint("Qwen/Qwen2.5-7B-Instruct-1M", with_weights=False)
    assert {*calls[0]["allow_patterns"]} - {*calls[1]["allow_patterns"]} == {"*.safetensors"}


def hub_errors() -> list:
    from huggingface_hub import errors

    def bare(kind: type[Exception]) -> Exception:
        return kind.__new__(kind, "x\ny")  # their constructors want an HTTP response

    return [
        pytest.param(bare(errors.GatedRepoError), "gated", id="gated"),
        pytest.param(bare(errors.RepositoryNotFoundError), "no such repository", id="not-found"),
        pytest.param(errors.LocalEntryNotFoundError("x\ny"), "cannot be reached", id="offline"),
        pytest.param(errors.OfflineModeIsEnabled("x\ny"), "cannot be reached", id="offline-mode"),
        pytest.param(OSError("disk\nfull"), "download failed .disk full.", id="disk"),
    ]


@pytest.mark.parametrize(("error", "text"), hub_errors())
def test_hub_errors(monkeypatch, error, text):
    fake_download(monkeypatch, error)
    with pytest.raises(CheckpointError, match=f"a/b: .*{text}") as caught:
        resolve_checkpoint("a/b")
    assert "\n" not in str(caught.value)


def test_hub_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="pip install huggingface_hub"):
        resolve_checkpoint("a/b")


@pytest.mark.parametrize("quantization", [None, "fp8", "int8"])
def test_large_matrices_are_read_in_pieces(
    quantization: Quantization | None, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every piece lands where it belongs: the model is the one that is read whole."""
    found = []
    for numbers in (weights.PIECE_NUMBERS, 2**16):
        monkeypatch.setattr(weights, "PIECE_NUMBERS", numbers)
        with LLM("nano", device="cpu", num_threads=1, max_model_len=64,
                 quantization=quantization) as llm:
            model = llm._runner._stages[0].model
            found.append([*model.parameters(),
                          *(module.dense() for module in model.modules()
                            if isinstance(module, Int8Linear) and module._packed is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert max(part.numel() for part in found[0]) > 2**16
