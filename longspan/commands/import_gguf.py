"""`longspan import`: a GGUF file as a Hugging Face directory, bf16 safetensors and a tokenizer."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.commands.console import note
from longspan.dca_config import DCA_REACH, derive_dca
from longspan.errors import LongspanError, MissingDependencyError
from longspan.units import in_gib

if TYPE_CHECKING:
    from longspan.model.gguf import GgufModel, PlannedTensor


def import_gguf(
    file: Annotated[Path, typer.Argument(help="GGUF file; of a split model any part.")],
    directory: Annotated[Path, typer.Argument(help="Folder to make; has to be empty.")],
    dca: Annotated[bool, typer.Option(
        "--dca", help="Dual chunk attention, for texts longer than the model's window.")] = False,
) -> None:
    """Turn a GGUF file (Qwen2, Qwen3, Llama shape) into a directory that longspan runs."""
    _check_directory(directory)
    try:
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name} is not installed: pip install 'longspan[gguf]'") from None
    from longspan.config import ModelConfig
    from longspan.model.gguf import hf_config, is_tied, plan_tensors, read_gguf

    model = read_gguf(file.expanduser())
    config = hf_config(model, is_tied=is_tied(model))
    if dca:
        config |= dca_config(config["max_position_embeddings"])
    config |= _token_ids(model)
    config["provenance"] = {
        "source": model.path.name, "format": "GGUF", "quantisation": model.quantisation(),
        "name": model.fields.get("general.name")}
    tensors = plan_tensors(model, ModelConfig.from_hf(config, source=str(model.path)))
    _write(directory, model, config, tensors)
    note(f"{directory}: {config['architectures'][0]}, up to {config['max_position_embeddings']:,} "
         f"tokens{' with DCA' if dca else ''}; longspan generate {directory} --prompt-file FILE")


def dca_config(window: int) -> dict[str, Any]:
    """Write down DCA for weights trained on ``window`` tokens."""
    return {"max_position_embeddings": DCA_REACH * window,
            "dual_chunk_attention_config": asdict(derive_dca(window))}


def _check_directory(directory: Path) -> None:
    from longspan.files.whole import PART

    if directory.exists() and not directory.is_dir():
        raise LongspanError(f"{directory} is a file; name a folder")
    # A part that an interrupted run left behind is written anew.
    if directory.is_dir() and any(item.name != PART for item in directory.iterdir()):
        raise LongspanError(f"{directory} is not empty; name a new folder")


def _token_ids(model: GgufModel) -> dict[str, Any]:
    ids = {key: model.fields.get(f"tokenizer.ggml.{name}_token_id")
           for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"),
                             ("pad_token_id", "padding"))}
    return {key: value for key, value in ids.items() if value is not None}


def _write(
    directory: Path, model: GgufModel, config: dict[str, Any], tensors: list[PlannedTensor]
) -> None:
    from longspan.commands.gguf_tokenizer import build_tokenizer, end_ids
    from longspan.engine.text.tokenizer import load_tokenizer
    from longspan.files.whole import replaced_checkpoint
    from longspan.model.safetensors_writer import num_bytes, write_tensors

    tokenizer = build_tokenizer(model)
    generation = _token_ids(model) | {"eos_token_id": end_ids(model)}
    total = sum(map(num_bytes, tensors))
    is_new = not directory.exists()
    try:
        with replaced_checkpoint(directory) as folder:
            free = shutil.disk_usage(folder).free
            if free < total:
                raise LongspanError(f"{directory}: the weights are {in_gib(total)}, and "
                                    f"{in_gib(free)} are free there; make room, or name a folder "
                                    "on another disk")
            tokenizer.save_pretrained(folder)
            load_tokenizer(folder, config["vocab_size"])
            with _bar(total) as bar:
                write_tensors(folder, tensors, lambda count: bar.advance(bar.task_ids[0], count))
            for name, content in (("config.json", config), ("generation_config.json", generation)):
                (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    except BaseException:
        if is_new:
            with suppress(OSError):
                directory.rmdir()
        raise


def _bar(total: int) -> Any:
    """Live on a terminal; nothing in logs."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(TextColumn("import"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
                   console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    bar.add_task("import", total=total)
    return bar
