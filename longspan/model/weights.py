"""From a checkpoint on disk or on the hub to a filled model.

Each file is read once, tensor by tensor, large matrices in pieces, into the model's own storage, so
that peak memory is one model and one tensor or piece. Every tensor of the checkpoint is accounted
for: missing, wrongly shaped and unknown ones are errors, before the first byte is copied.
Format: safetensors (8 bytes of header length, a JSON header, then the data).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Set
from importlib.resources import files as package_files
from pathlib import Path

import torch

from longspan.errors import CheckpointError
from longspan.model.fused_experts import split_fused
from longspan.model.hub import FACTS, TEXTS, WEIGHTS, download
from longspan.model.layers import RMSNorm
from longspan.model.linear import Cut, Linear, Target
from longspan.model.qwen2 import EMBEDDING, HEAD, CausalLM
from longspan.model.safetensors_files import SafetensorsReader, StoredTensor, stored_tensors
from longspan.model.sources import Source, find_sources
from longspan.model.stored_forms import KV_SCALES, SUFFIXES
from longspan.weight_form import BLOCK

BUNDLED_MODEL = "nano"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ONE_EXPERT_NAME = re.compile(r"\.mlp\.experts\.(\d+)\.")
RANDOM_STD = 0.02
PIECE_NUMBERS = 2**25
"""Larger matrices that are stored plain are read in pieces of whole blocks of rows."""


def is_on_hub(name: str) -> bool:
    """Whether a model's name is a hub id: neither bundled nor a directory."""
    is_here = name == BUNDLED_MODEL or os.path.exists(os.path.expanduser(name))
    return not is_here and HUB_ID.fullmatch(name) is not None


def resolve_checkpoint(
    name: str, *, with_weights: bool = True, only_facts: bool = False
) -> Path:
    """Directory of a checkpoint: ``nano`` (bundled), a directory, or a hub id.

    A hub id is downloaded to the hub's cache, or taken from there; without its weights where they
    are not asked for, or only what memory and time can be planned with. Raises `CheckpointError`
    when there is no such checkpoint, `MissingDependencyError` without huggingface_hub.
    """
    if name == BUNDLED_MODEL:
        return _bundled_model()
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):  # Path.is_dir raises for names that cannot be paths
        return path
    if os.path.isfile(path):
        raise CheckpointError(f"{name} is a file; name the directory that holds config.json")
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{name or 'no name'}: no such directory; name a directory, a hub id such as "
            f"Qwen/Qwen2.5-7B-Instruct-1M, or {BUNDLED_MODEL} for the bundled model"
        )
    if only_facts:
        return download(name, FACTS)
    return download(name, (*TEXTS, *WEIGHTS) if with_weights else TEXTS)


def load_weights(model: CausalLM, path: Path) -> None:
    """Fill every weight of `model` (a whole model or a pipeline stage) from a checkpoint.

    Raises `CheckpointError` for absent, truncated or corrupt files and for missing, wrongly
    shaped, quantised or unknown tensors.
    """
    stored = stored_tensors(path)
    targets, fused = split_fused(stored, model, lambda entry: entry.shape)
    _refuse_other_experts(stored, model)
    sources = find_sources(stored, targets, model.config.quantization, path)
    _refuse_unknown(stored, model, fused)
    if model.config.tie_word_embeddings and EMBEDDING in targets and HEAD in stored:
        _check_tied(stored)
    with SafetensorsReader() as reader:
        for name, source in sorted(sources.items(), key=lambda item: item[1].place):
            _fill(targets[name], source, reader)


def _fill(target: Target, source: Source, reader: SafetensorsReader) -> None:
    rows = PIECE_NUMBERS // target.shape[-1] // BLOCK * BLOCK
    if (target.fill_rows is None or target.cut is not None or not source.is_plain
            or not 0 < rows < target.shape[0]):
        target.fill(source.read(reader, target.cut))
        return
    for start in range(0, target.shape[0], rows):
        piece = start, min(start + rows, target.shape[0])
        target.fill_rows(start, source.read(reader, Cut(rows=(piece,))))


def random_weights(model: CausalLM, seed: int) -> None:
    """Fill `model` with normal weights of std 0.02 and norms of 1: real shapes, no download."""
    device = model.decoder_layers()[0].input_layernorm.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        rest = dict(module.named_parameters(recurse=False))
        if isinstance(module, Linear):
            module.fill_randomly(RANDOM_STD, generator)
            rest = {} if module.bias is None else {"bias": module.bias}
        for parameter in rest.values():
            if isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, RANDOM_STD, generator=generator)


def _bundled_model() -> Path:
    path = Path(str(package_files("longspan") / BUNDLED_MODEL))
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: the bundled model is not in this installation; install the released wheel, "
            "or name a directory or a hub id"
        )
    return path


def _check_tied(stored: Mapping[str, StoredTensor]) -> None:
    """Refuse a separate head beside tied embeddings: only transformers 5 would use it."""
    head, embedding = stored[HEAD], stored[EMBEDDING]
    is_same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if is_same:
        with SafetensorsReader() as reader:
            is_same = torch.equal(reader.read(head), reader.read(embedding))
    if not is_same:
        raise CheckpointError(
            f"{head.file}: {HEAD} differs from {EMBEDDING}, and config.json ties them; set "
            "tie_word_embeddings to false to use this head, or remove it from the file")


def _refuse_other_experts(stored: Mapping[str, StoredTensor], model: CausalLM) -> None:
    """Refuse a checkpoint of more experts than config.json says, or of any where it says none."""
    experts = model.config.experts
    for name, entry in stored.items():
        found = ONE_EXPERT_NAME.search(name)
        if found and experts is not None and int(found[1]) >= experts.num_experts:
            raise CheckpointError(
                f"{entry.file}: {name} is of expert {found[1]}, and config.json says num_experts "
                f"{experts.num_experts} (0 to {experts.num_experts - 1}); correct config.json")


def _refuse_unknown(
    stored: Mapping[str, StoredTensor], model: CausalLM, fused: Set[str],
) -> None:
    """Refuse a stored tensor that no layer of the model has and that is not redundant.

    Args:
        fused: tensors that hold all experts of some layer that has experts.
    """
    experts = model.config.experts
    known = model.checkpoint_names()
    known |= {name for name in fused if experts and experts.is_routed(int(name.split(".")[2]))}
    unknown = [name for name in stored
               if name not in known and not name.endswith("rotary_emb.inv_freq")
               and not _is_part(name, known, model)]
    if unknown:
        raise CheckpointError(
            f"{stored[unknown[0]].file}: {len(unknown)} unknown tensors, the first is "
            f"{unknown[0]}; this is not a plain {model.config.architecture} checkpoint"
        )


def _is_part(name: str, known: Set[str], model: CausalLM) -> bool:
    """Return whether a stored tensor belongs to a matrix of a quantised checkpoint."""
    module, _, suffix = name.rpartition(".")
    if model.config.quantization is None:
        return False
    if suffix in KV_SCALES:
        return f"{module.removesuffix('.attn')}.o_proj.weight" in known
    return suffix in SUFFIXES and f"{module}.weight" in known
