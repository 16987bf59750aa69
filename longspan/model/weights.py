"""From a checkpoint on disk or on the hub to a filled model.

Each file is read once, tensor by tensor, into the model's own storage, so that peak memory is one
model and one tensor. Every tensor of the checkpoint is accounted for: missing, wrongly shaped and
unknown ones are errors, before the first byte is copied.
Format: safetensors (8 bytes of header length, a JSON header, then the data).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from importlib.resources import files as package_files
from itertools import groupby, pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.config import read_json
from longspan.errors import CheckpointError
from longspan.model.fused_experts import split_fused
from longspan.model.hub import FACTS, TEXTS, WEIGHTS, download
from longspan.model.layers import RMSNorm
from longspan.model.linear import Linear, Target
from longspan.model.qwen2 import EMBEDDING, HEAD, CausalLM

BUNDLED_MODEL = "nano"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ONE_EXPERT_NAME = re.compile(r"\.mlp\.experts\.(\d+)\.")
MAX_HEADER_BYTES = 100_000_000
RANDOM_STD = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file, as the file's header states it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """Name in the format, such as ``BF16``."""
    start: int
    """First byte in the file."""
    stop: int
    """Byte behind the last one."""


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
    stored = _stored_tensors(path)
    targets, fused = split_fused(stored, model, lambda entry: entry.shape)
    _refuse_other_experts(stored, model)
    _check(stored, targets, path)
    _refuse_unknown(stored, model, fused)
    if model.config.tie_word_embeddings and EMBEDDING in targets and HEAD in stored:
        _check_tied(stored)
    for name, tensor in _read({name: stored[name] for name in targets}):
        targets[name].fill(tensor)


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


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return name and place of every tensor of a checkpoint, from the headers of its files."""
    if (path / SINGLE_FILE).is_file():
        return _read_header(path / SINGLE_FILE)
    if (path / INDEX_FILE).is_file():
        return _indexed_tensors(path)
    others = sorted(path.glob("*.safetensors"))
    if others:
        raise CheckpointError(
            f"{path}: {len(others)} safetensors files ({others[0].name}, ...) but neither "
            f"{SINGLE_FILE} nor {INDEX_FILE}; fetch the index too"
        )
    old = sorted(path.glob("*.bin"))
    found = f" ({old[0].name} found; convert it with transformers' save_pretrained)" if old else ""
    raise CheckpointError(f"{path}: no safetensors file there{found}")


def _indexed_tensors(path: Path) -> dict[str, StoredTensor]:
    index = read_json(path / INDEX_FILE)
    places = index.get("weight_map") if isinstance(index, dict) else None
    sound = isinstance(places, dict) and all(isinstance(name, str) for name in places.values())
    if not places or not sound:
        raise CheckpointError(f"{path / INDEX_FILE}: no weight_map in it; fetch the file again")
    shards = sorted(set(places.values()))
    absent = [name for name in shards if not (path / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{path}: {len(absent)} of {len(shards)} shards are missing, the first is {absent[0]}; "
            "fetch them"
        )
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        found = _read_header(path / shard)
        twice = next((name for name in found if name in stored), None)
        if twice is not None:
            raise CheckpointError(f"{path / shard}: {twice} is in {stored[twice].file.name} too; "
                                  "these shards do not belong together, fetch them again")
        stored |= found
    lost = [name for name, shard in places.items()
            if name not in stored or stored[name].file != path / shard]
    if lost:
        raise CheckpointError(
            f"{path / places[lost[0]]}: {len(lost)} tensors named in {INDEX_FILE} are missing, the "
            f"first is {lost[0]}; fetch the file again"
        )
    return stored


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Parse a safetensors header and compare the file's size with it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_len = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise CheckpointError(f"{file}: a git-lfs pointer, not the weights; run `git lfs pull`")
        if size < 8 or header_len > MAX_HEADER_BYTES:
            raise _corrupt(file)
        text = stream.read(header_len)
    first = 8 + header_len
    if len(text) < header_len:
        raise _truncated(file, size, first)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        stored = {name: _stored(file, entry, first) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _corrupt(file) from None
    places = sorted((entry.start, entry.stop) for entry in stored.values())
    end = max((stop for _, stop in places), default=first)
    if size < end:
        raise _truncated(file, size, end)
    # The format leaves no gap, so that no byte is read twice or not at all.
    edges = [(first, first), *places, (size, size)]
    if any(start > stop for start, stop in places) or any(
            one[1] != other[0] for one, other in pairwise(edges)):
        raise _corrupt(file)
    return stored


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; raises `ValueError` where a key stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _corrupt(file: Path) -> CheckpointError:
    return CheckpointError(f"{file}: corrupt safetensors header; fetch the file again")


def _truncated(file: Path, size: int, expected: int) -> CheckpointError:
    return CheckpointError(
        f"{file}: truncated, {size:,} of {expected:,} bytes; fetch the file again")


def _stored(file: Path, entry: Mapping[str, Any], first: int) -> StoredTensor:
    """``first``: where the file's data begins."""
    start, stop = (first + int(n) for n in entry["data_offsets"])
    return StoredTensor(file=file, shape=tuple(int(n) for n in entry["shape"]),
                        dtype=str(entry["dtype"]), start=start, stop=stop)


def _check(
    stored: Mapping[str, StoredTensor], targets: Mapping[str, Target], path: Path,
) -> None:
    missing = [name for name in targets if name not in stored]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(targets)} tensors are missing, the first is "
            f"{missing[0]}; the checkpoint does not fit its config.json"
        )
    for name, target in targets.items():
        entry = stored[name]
        if entry.shape != target.shape:
            raise CheckpointError(
                f"{entry.file}: {name} has shape {list(entry.shape)}, config.json asks for "
                f"{list(target.shape)}"
            )
        if entry.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{entry.file}: {name} is stored as {entry.dtype}; only {', '.join(FLOAT_TYPES)} "
                "are supported, convert it or use an unquantised checkpoint"
            )
        if entry.stop - entry.start != prod(entry.shape) * FLOAT_TYPES[entry.dtype].itemsize:
            raise _corrupt(entry.file)


def _check_tied(stored: Mapping[str, StoredTensor]) -> None:
    """Refuse a separate head beside tied embeddings: only transformers 5 would use it."""
    head, embedding = stored[HEAD], stored[EMBEDDING]
    is_same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if is_same:
        (_, one), (_, other) = _read({HEAD: head, EMBEDDING: embedding})
        is_same = torch.equal(one, other)
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
               if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise CheckpointError(
            f"{stored[unknown[0]].file}: {len(unknown)} unknown tensors, the first is "
            f"{unknown[0]}; this is not a plain {model.config.architecture} checkpoint"
        )


def _read(wanted: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors in the order of the disk, on the CPU. Files are opened once and not
    mapped: mapped pages, though already copied, would count as this process's memory."""
    ordered = sorted(wanted.items(), key=lambda item: (item[1].file, item[1].start))
    for file, entries in groupby(ordered, key=lambda item: item[1].file):
        with file.open("rb") as stream:
            for name, entry in entries:
                tensor = torch.empty(entry.shape, dtype=FLOAT_TYPES[entry.dtype])
                stream.seek(entry.start)
                stream.readinto(tensor.flatten().view(torch.uint8).numpy())
                if stream.tell() < entry.stop:  # the file has changed since its header was read
                    raise _truncated(file, stream.tell(), entry.stop)
                yield name, tensor
