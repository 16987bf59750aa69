"""nano from nothing: corpus, tokenizer, five-phase pre-training, export.

    python -m recipes.nano corpus --out .carry --root DIR=MEGABYTES --root ...
    python -m recipes.nano train  --data .carry --out runs/nano
    python -m recipes.nano export --data .carry --out runs/nano --model-dir longspan/nano

The shipped weights read 86 MB of text (19.3M tokens kept). Roots in megabytes, unpacked from
Debian 12 packages unless said otherwise: python3.11-doc sources 12, python-django-doc 6, linux-doc
10, debian-handbook 3, debian-policy 2, developers-reference 1, debian-reference 1, git-doc 4,
postgresql-doc 5, sqlite3-doc 4, perl-doc 4, vim-doc 2.5, bash-doc 0.8, r-doc-html 1.2, fortunes
2.5, jargon-text 1.5, manual pages 3, /usr/share/doc 2, the library of CPython 3.11 9, Debian's
Python packages 3, and from PyPI networkx 1.5, sympy 2.5, transformers 2.5, torch 3.5, numpy 1.5,
pydantic 0.7, fsspec 0.5, huggingface_hub 1, accelerate 0.5.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2ForCausalLM

from longspan.data.compose import Source, template_texts
from longspan.data.corpus import frequent_words, write_shards
from longspan.data.probes import probe_haystack
from longspan.data.rows import compose_batch, load_source
from longspan.data.sources import Document, Root, read_documents
from longspan.data.tokens import Kind
from longspan.train.export import export_model, join_shards
from longspan.train.gates import Haystack, inference_copy, score_haystacks
from longspan.train.model import build_model
from longspan.train.phases import Phase, Shape
from longspan.train.pretrain import Batch, RunConfig, pretrain
from longspan.train.report import write_results
from longspan.train.state import load_weights
from longspan.train.tokenizer import save_tokenizer, train_tokenizer

VOCAB_SIZE = 4096
KIND_WEIGHTS = {Kind.PLANTED: 0.0, Kind.ANSWER: 5.0, Kind.COPY: 2.0}
"""A planted value is random at its first mention, so it cannot be learnt."""
GATE_LENGTHS = (4096, 32_768, 131_072, 262_144)
M = 1_000_000


def nano_phases() -> list[Phase]:
    """The report's five lengths and bases with nano's tokens and rates."""
    return [
        Phase(name="4k", seq_len=4096, rope_theta=1e4, num_tokens=300 * M, learning_rate=1.5e-3),
        Phase(name="32k", seq_len=32_768, rope_theta=1e6, num_tokens=40 * M, learning_rate=1e-3),
        Phase(
            name="64k", seq_len=65_536, rope_theta=1e6, num_tokens=20 * M, learning_rate=8e-4,
            shorter=(32_768,), full_share=0.75,
        ),
        Phase(
            name="128k", seq_len=131_072, rope_theta=5e6, num_tokens=14 * M, learning_rate=6e-4,
            shorter=(65_536, 32_768), full_share=0.75,
        ),
        Phase(
            name="256k", seq_len=262_144, rope_theta=1e7, num_tokens=17 * M, learning_rate=5e-4,
            shorter=(131_072, 65_536, 32_768), full_share=0.75,
        ),
    ]  # fmt: skip


def smoke_phases() -> list[Phase]:
    """Two tiny phases that exercise everything in seconds on a CPU."""
    tiny = partial(Phase, num_tokens=8192, tokens_per_step=1024)
    return [
        tiny(name="a", seq_len=256, rope_theta=1e4, learning_rate=1e-3),
        tiny(name="b", seq_len=512, rope_theta=1e6, learning_rate=5e-4, shorter=(256,),
             full_share=0.75),
    ]  # fmt: skip


class StepDataset(Dataset[Batch]):
    """Batches by step number, so that any worker can make any step."""

    def __init__(self, data: Path, seed: Sequence[int], shapes: Sequence[Shape]) -> None:
        self.data, self.seed, self.shapes = data, tuple(seed), shapes
        self.source: Source | None = None

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, step: int) -> Batch:
        if self.source is None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            self.source = load_data(self.data)
        rows, length = self.shapes[step]
        ids, kinds = compose_batch((*self.seed, step), self.source, rows, length)
        return torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(kinds)


def load_data(data: Path, split: str = "train") -> Source:
    """Corpus split and token table of a data directory written by `corpus`."""
    return load_source(data / "corpus", data / "tokenizer" / "tokenizer.json", split)


def loader_batches(
    data: Path, seed: int, num_workers: int, phase: int, schedule: Sequence[Shape], first: int
) -> Iterator[Batch]:
    """Batches of the steps `first`.. of a phase, made by worker processes."""
    loader = DataLoader(
        StepDataset(data, (seed, phase), schedule),
        batch_size=None,
        sampler=range(first, len(schedule)),
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def gate_haystacks(
    data: Path, length: int, count: int, needles: int, seed: int = 1
) -> Iterator[Haystack]:
    """Held-out gate documents, every second one with hard keys."""
    source = load_data(data, "held_out")
    for i in range(count):
        document, questions = probe_haystack((seed, length, i), source, length, needles, i % 2 == 1)
        yield Haystack(document, questions)


def run_gate(
    data: Path, lengths: Sequence[int], count: int, needles: int, model: Any, phase: Phase
) -> dict[str, Any]:
    """Exact-answer shares at the phase's length, or at all `lengths` after the longest phase."""
    wanted = lengths if phase.seq_len == max(lengths) else (phase.seq_len,)
    torch.backends.cuda.enable_flash_sdp(True)
    clone = inference_copy(model)
    result: dict[str, Any] = {}
    for length in wanted:
        score = score_haystacks(clone, gate_haystacks(data, length, count, needles))
        result[f"exact_{length}"] = score.exact
        result[f"digits_{length}"] = score.token_accuracy
        result[f"n_{length}"] = score.num_questions
    return result


def make_corpus(roots: Sequence[Root], out: Path) -> None:
    """Reads roots, trains the tokenizer on a sample of text and templates, writes shards."""
    documents = read_documents(roots)
    templates = template_texts(frequent_words(documents))
    tokenizer = train_tokenizer([*tokenizer_sample(documents), *templates], VOCAB_SIZE)
    save_tokenizer(tokenizer, out / "tokenizer")
    print(json.dumps(write_shards(documents, tokenizer, out / "corpus")))


def tokenizer_sample(documents: Sequence[Document], seed: int = 0) -> Iterator[str]:
    """60 kB from each 400 kB of the training documents."""
    rng = random.Random(seed)
    for document in documents:
        for _ in range(0 if document.is_held_out else max(1, len(document.text) // 400_000)):
            start = rng.randrange(max(1, len(document.text) - 60_000))
            yield document.text[start : start + 60_000]


def fresh_model(smoke: bool, vocab_size: int = VOCAB_SIZE) -> Qwen2ForCausalLM:
    """nano, or a two-layer toy with the same vocabulary."""
    if smoke:
        return build_model(
            vocab_size=vocab_size, num_layers=2, hidden_size=64, num_heads=2, num_kv_heads=1,
            intermediate_size=96,
        )  # fmt: skip
    return build_model(vocab_size=vocab_size)


def train(args: argparse.Namespace) -> None:
    """Runs or resumes the phases, gates each, and exports bf16 shards to --shards."""
    phases = chosen_phases(args)
    source = load_data(args.data)
    config = RunConfig(
        out_dir=args.out,
        kind_weights=KIND_WEIGHTS,
        filler_kind=Kind.FILLER,
        answer_kind=Kind.ANSWER,
        inputs={"data": args.data / "corpus", "tokenizer": args.data / "tokenizer"},
        token_bytes=tuple(int(n) for n in source.table.num_bytes),
        device="cuda" if torch.cuda.is_available() else "cpu",
        deadline_s=args.deadline_s,
        phase_start_s=45.0 if torch.cuda.is_available() else 0.0,
        compile=torch.cuda.is_available() and not args.eager,
        recompute=args.recompute,
        resume=args.resume,
        warmup_steps=4 if args.smoke else 150,
    )
    lengths = (256, 512) if args.smoke else GATE_LENGTHS
    count, needles = (2, 2) if args.smoke else (4, 32)
    gate = partial(run_gate, args.data, lengths, count, needles)
    model = fresh_model(args.smoke)
    batches = partial(loader_batches, args.data, config.seed, args.workers)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    progress = pretrain(model, phases, batches, config, gate, stop)
    print(f"ended at {progress}", flush=True)
    if args.shards:
        write_export(model, progress.trained(phases), args.data, args.shards)


def chosen_phases(args: argparse.Namespace) -> list[Phase]:
    """The recipe's phases, with token counts replaced by --tokens name=millions."""
    phases = smoke_phases() if args.smoke else nano_phases()
    changes = dict(pair.split("=") for pair in args.tokens)
    unknown = set(changes) - {p.name for p in phases}
    if unknown:
        raise ValueError(
            f"no phase named {sorted(unknown)}: choose from {[p.name for p in phases]}"
        )
    fields = [{k: getattr(p, k) for k in Phase.__dataclass_fields__} for p in phases]
    for values in fields:
        if values["name"] in changes:
            values["num_tokens"] = round(float(changes[values["name"]]) * M)
    return [Phase(**values) for values in fields]


def write_export(model: Qwen2ForCausalLM, phase: Phase, data: Path, out: Path) -> None:
    """Exports shards of at most 14 MB, so that they travel as small files."""
    export_model(
        model, data / "tokenizer", out, rope_theta=phase.rope_theta, trained_len=phase.seq_len,
        max_shard_size="14MB",
    )  # fmt: skip


def export(args: argparse.Namespace) -> None:
    """Writes the model directory from a run's state, or from the bf16 shards it exported."""
    if args.shards:
        join_shards(args.shards, args.model_dir)
        return
    model = fresh_model(args.smoke)
    phase = load_weights(args.out, model)
    export_model(
        model, args.data / "tokenizer", args.model_dir, rope_theta=phase.rope_theta,
        trained_len=phase.seq_len)


def parse_root(text: str) -> Root:
    """`PATH=MEGABYTES` to a Root."""
    path, _, megabytes = text.rpartition("=")
    return Root(path=Path(path), max_bytes=round(float(megabytes) * M))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="recipes.nano", description=(__doc__ or "").split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus")
    corpus.add_argument("--root", type=parse_root, action="append", required=True)
    corpus.add_argument("--out", type=Path, required=True)
    for name in ("train", "export"):
        sub = commands.add_parser(name)
        sub.add_argument("--data", type=Path, required=True)
        sub.add_argument("--out", type=Path, required=True)
        sub.add_argument("--smoke", action="store_true")
        sub.add_argument("--tokens", action="append", default=[], metavar="PHASE=MILLIONS")
    run = commands.choices["train"]
    run.add_argument("--resume", action="store_true")
    run.add_argument("--eager", action="store_true")
    run.add_argument("--recompute", action="store_true")
    run.add_argument("--deadline-s", type=float, default=float("inf"))
    run.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    run.add_argument("--shards", type=Path)
    commands.choices["export"].add_argument("--shards", type=Path)
    commands.choices["export"].add_argument("--model-dir", type=Path, required=True)
    results = commands.add_parser("results")
    results.add_argument("--log", type=Path, required=True)
    results.add_argument("--file", type=Path, required=True)
    results.add_argument("--commit", default="unknown")
    results.add_argument("--run-command", default="python -m recipes.nano train")
    return top


def main() -> None:
    """Command-line entry."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_float32_matmul_precision("high")
    args = parser().parse_args()
    if args.command == "corpus":
        make_corpus(args.root, args.out)
    elif args.command == "train":
        train(args)
    elif args.command == "export":
        export(args)
    else:
        write_results(
            args.log, args.file, model="nano", command=args.run_command, commit=args.commit
        )


if __name__ == "__main__":
    main()
