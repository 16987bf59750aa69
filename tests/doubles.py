"""Test doubles: a runner that checks the KV cache it is given, transports, a byte tokenizer."""

from __future__ import annotations

import errno
import json
import os
import random
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from longspan.engine.control.chunking import chunk_stop, tail_start
from longspan.engine.control.copy_queue import TierConfig
from longspan.engine.control.ladder import Ladder
from longspan.engine.request import Request, SamplingParams
from longspan.engine.step import ScheduledBatch, ScheduledSlice, StepResult
from longspan.engine.transfer import Transfer, TransferResult

VOCAB_SIZE = 50
EOS = 0
MODEL: dict[str, Any] = {
    "architecture": "Qwen2ForCausalLM", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8,
    "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "max_position_embeddings": 64, "tie_word_embeddings": True,
    "attention_bias": True, "qk_norm": False}
"""Fields of a minimal `ModelConfig`."""
SPECIAL_TOKENS = ("<end>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('user', 'assistant', 'system') %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}")


def next_token(tokens: Sequence[int]) -> int:
    """The fake model: a fixed pseudo-random function of the whole context."""
    return random.Random(repr(list(tokens))).randrange(VOCAB_SIZE)


def complete(prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """What the fake model answers when nothing else runs."""
    tokens, output = list(prompt), list[int]()
    while len(output) < params.max_tokens:
        output.append(next_token(tokens + output))
        stops = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, EOS)
        if output[-1] in stops:
            break
    return output


def random_tiers(rng: random.Random) -> TierConfig:
    """Places besides the device, sometimes none: small ones, so that all are full soon."""
    has_disk = rng.random() < 0.6
    return TierConfig(
        num_slots=rng.choice([0, 8, 30, 100]), keeps_host=rng.random() < 0.3,
        folder="nowhere" if has_disk else "", disk_bytes=rng.choice([40_000, 200_000]),
        block_bytes=100, copy_bytes=rng.choice([100, 1000]), copy_bytes_per_s=1e6,
        copy_s=rng.choice([5e-3, 1.0]), min_written_len=rng.choice([0, 8]))


def make_request(
    request_id: str, prompt: Sequence[int], *, sparse: bool = False, **params: Any,
) -> Request:
    """A request for the fake model."""
    return Request(
        request_id=request_id, prompt_ids=array("i", prompt), params=SamplingParams(**params),
        eos_token_ids=frozenset({EOS}), sparse=sparse)


@dataclass(frozen=True, slots=True)
class ComputedStep:
    """A step whose result is there already."""

    result: StepResult

    def wait_for(self, timeout_s: float) -> bool:
        """It is there."""
        return True

    def wait(self) -> StepResult:
        """At once."""
        return self.result


class FakeRunner:
    """Keeps in each slot what the real keys would depend on, and checks it on every read.

    Dense: the tokens up to the slot. Sparse: the tokens up to the prefill chunk's end, and how they
    were cut into chunks. A wrong block,
    a block reused too early or a cache hit on something impure fails an assertion. Of a sparse
    chunk in pieces the slots hold nothing of use before the last piece; pieces must follow one
    another, and no other chunk may begin in between.
    """

    def __init__(
        self, *, num_blocks: int, block_size: int, prefill_chunk_len: int, tail_len: int = 0,
        num_stages: int = 1,
    ) -> None:
        self.block_size, self.tail = block_size, tail_len
        self.chunks = Ladder(
            longest=prefill_chunk_len, num_stages=num_stages, block_size=block_size)
        self.slots: list[object] = [None] * (num_blocks * block_size)
        self.tokens: list[int] = [-1] * (num_blocks * block_size)
        self.num_computed = 0
        self.paused: tuple[str, int, int] | None = None
        """Request, first token and pieces done of the sparse chunk that is paused."""
        self.latest: dict[int, int] = {}
        """Token sampled last, by slot: what slices without an input token go on from."""
        self.batches: list[ScheduledBatch] = []
        self.places = FakePlaces(self)

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Write, check, sample."""
        if batch.repeats > 1:
            assert not batch.prefills and all(item.extras is None for item in batch.slices)
            parts = [self.execute(part) for part in batch.each()]
            return replace(parts[0], repeats=batch.repeats,
                           token_ids=tuple(t for part in parts for t in part.token_ids),
                           elapsed_s=sum(part.elapsed_s for part in parts))
        self.batches.append(batch)
        ended = self.places.move(batch)
        kinds = [item.context_len > item.prompt_len for item in batch.slices]
        assert kinds == sorted(kinds), "prefill slices come before decodes"
        tokens = [self._run(item) if self._resume(item) else None for item in batch.slices]
        self.num_computed += batch.num_tokens
        return StepResult(
            step_id=batch.step_id, epoch=batch.epoch,
            token_ids=tuple(token for token in tokens if token is not None),
            elapsed_s=self.elapsed_s(batch),
            kept_pairs=1.0, causal_pairs=4.0, transfers=ended)

    def launch(self, batch: ScheduledBatch) -> ComputedStep:
        """Compute now, as CPUs do."""
        return ComputedStep(self.execute(batch))

    def elapsed_s(self, batch: ScheduledBatch) -> float:
        """What the runner claims to have needed: a millisecond, a token, a hundred pairs each;
        a piece is its share of the chunk."""
        total_s = 0.001
        for item in batch.slices:
            share = (item.pieces.stop - item.pieces.first) / item.pieces.total \
                if item.pieces else 1.0
            total_s += share * item.query_len * (1e-3 + 1e-5 * item.context_len)
        return total_s

    def _resume(self, item: ScheduledSlice) -> bool:
        """Go on with a chunk; whether all of the slice is computed afterwards."""
        if item.pieces is None:
            return True
        if item.pieces.first:
            assert self.paused == (item.request_id, item.cached_len, item.pieces.first), self.paused
        assert item.pieces.first < item.pieces.stop <= item.pieces.total
        self.paused = None if item.pieces.is_last else (
            item.request_id, item.cached_len, item.pieces.stop)
        for slot in self._slots(item)[item.cached_len:]:
            self.slots[slot] = ("in the making", item.request_id)
        return item.pieces.is_last

    def _slots(self, item: ScheduledSlice) -> list[int]:
        return [item.block_ids[p // self.block_size] * self.block_size + p % self.block_size
                for p in range(item.context_len)]

    def _run(self, item: ScheduledSlice) -> int | None:
        slots = self._slots(item)
        inputs = item.token_ids or [self.latest[item.slot]]
        for slot, token in zip(slots[item.cached_len:], inputs, strict=True):
            self.tokens[slot] = token
        context = [self.tokens[slot] for slot in slots]
        for position in range(item.cached_len, item.context_len):
            self.slots[slots[position]] = self._written(item, context, position)
        for position, slot in enumerate(slots):
            assert self.slots[slot] == self._expected(item, context, position), (item, position)
        if item.sampling is None:
            return None
        self.latest[item.slot] = next_token(context)
        return self.latest[item.slot]

    def _written(self, item: ScheduledSlice, context: list[int], position: int) -> object:
        start, stop = item.cached_len, item.context_len
        return self._content(item, context, position, [*self._cuts(item, start), start, stop])

    def _expected(self, item: ScheduledSlice, context: list[int], position: int) -> object:
        """What a run without any cache would have written."""
        cuts = self._cuts(item, position + 1)
        end = chunk_stop(cuts[-1], item.prompt_len, self.chunks, self._tail(item)) \
            if position < item.prompt_len else position + 1
        return self._content(item, context, position, [*cuts, end])

    def _content(
        self, item: ScheduledSlice, context: list[int], position: int, cuts: list[int],
    ) -> object:
        if not item.sparse:
            return hash(tuple(context[: position + 1]))
        return hash((*context[: cuts[-1]], "cuts", *cuts))

    def _tail(self, item: ScheduledSlice) -> int:
        return tail_start(item.prompt_len, self.tail, self.block_size)

    def _cuts(self, item: ScheduledSlice, stop: int) -> list[int]:
        """Where a sparse prompt's chunks, and then its decodes, begin before ``stop``."""
        cuts, start = list[int](), 0
        while start < stop:
            cuts.append(start)
            start = chunk_stop(start, item.prompt_len, self.chunks, self._tail(item)) \
                if start < item.prompt_len else start + 1
        return cuts


class FakePlaces:
    """Host slots and files of a `FakeRunner`: copies what its blocks hold.

    Transfers end at once, or late and out of order where ``rng`` is set; some reads fail then, and
    what they should have written is garbage.
    """

    def __init__(self, runner: FakeRunner) -> None:
        self.runner = runner
        self.rng: random.Random | None = None
        self.host: dict[int, tuple[list[object], list[int]]] = {}
        self.files: dict[str, dict[bytes, tuple[list[object], list[int]]]] = {}
        self.ended: dict[int, TransferResult] = {}
        self.open: list[Transfer] = []
        self.known: set[int] = set()
        self.counts: Counter[str] = Counter()

    def move(self, batch: ScheduledBatch) -> tuple[TransferResult, ...]:
        """Begin a step's transfers, end some, and report those that were not seen to end."""
        for seen in batch.seen:
            self.ended.pop(seen, None)
        for transfer in batch.transfers:
            if transfer.transfer_id not in self.known:
                self.known.add(transfer.transfer_id)
                self.open.append(transfer)
        while self.open and not (self.rng and self.rng.random() < 0.3):
            copies = self._next_copies()
            others = [t for t in self.open if t.kind not in ("save", "load")]
            options = copies + (others if self.rng else others[:1])
            transfer = self.rng.choice(options) if self.rng else options[0]
            self.open.remove(transfer)
            self.ended[transfer.transfer_id] = self._do(transfer)
        return tuple(self.ended.values())

    def _next_copies(self) -> list[Transfer]:
        """The first copy; where ``rng`` is set the first one of each direction, but for a load into
        blocks that are to be saved before."""
        copies = [t for t in self.open if t.kind in ("save", "load")]
        if not self.rng or not copies:
            return copies[:1]
        first = {t.kind: t for t in reversed(copies)}
        load = first.get("load")
        if load is not None and any(
                t.kind == "save" and not set(t.blocks).isdisjoint(load.blocks)
                for t in copies[:copies.index(load)]):
            del first["load"]
        return [*first.values()]

    def _do(self, transfer: Transfer) -> TransferResult:
        self.counts[transfer.kind] += 1
        size, failure = self.runner.block_size, ""
        spans = [slice(block * size, (block + 1) * size) for block in transfer.blocks]
        names = [transfer.hashes[i:i + 16] for i in range(0, len(transfer.hashes), 16)]
        if transfer.kind == "save":
            for slot, span in zip(transfer.slots, spans, strict=True):
                self.host[slot] = self.runner.slots[span], self.runner.tokens[span]
        elif transfer.kind == "load":
            for slot, span in zip(transfer.slots, spans, strict=True):
                self.runner.slots[span], self.runner.tokens[span] = self.host[slot]
        elif transfer.kind == "write":
            if self.rng and self.rng.random() < 0.1:
                failure = os.strerror(errno.ENOSPC)
            else:
                self.files[transfer.file] = {
                    name: self.host[slot]
                    for name, slot in zip(names, transfer.slots, strict=True)}
        elif transfer.kind == "read":
            found = self.files.get(transfer.file, {})
            is_bad = self.rng is not None and self.rng.random() < 0.1
            for name, slot in zip(names, transfer.slots, strict=True):
                failure = failure or ("damaged" if is_bad or name not in found else "")
                self.host[slot] = ([None] * size, [-1] * size) if failure else found[name]
        else:
            self.files.pop(transfer.file, None)
        self.counts["failure"] += bool(failure)
        return TransferResult(transfer_id=transfer.transfer_id, failure=failure,
                              elapsed_s=1e-4 * len(transfer.slots))


class DeepTransport:
    """Computes at submission and hands results out later: several steps in flight."""

    def __init__(self, executor: FakeRunner, max_in_flight: int) -> None:
        self.executor, self.max_in_flight = executor, max_in_flight
        self.results: deque[StepResult] = deque()

    def submit(self, batch: ScheduledBatch) -> None:
        """Compute now."""
        self.results.append(self.executor.execute(batch))

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """The oldest result."""
        return self.results.popleft()

    def discard(self) -> None:
        """Lose everything in flight."""
        self.results.clear()


def write_tokenizer(path: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """A byte tokenizer as tokenizer.json: 256 tokens of one byte, then `SPECIAL_TOKENS`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config: dict[str, Any] = {"eos_token": {"content": "<end>"}}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def begin_texts_with(path: Path, token: str, token_id: int) -> None:
    """Make a checkpoint's tokenizer add a token at the beginning of each text, as Llama's does."""
    file = path / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": token, "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}}}
    file.write_text(json.dumps(raw))


EXPERTS: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "norm_topk_prob": False,
    "mlp_only_layers": [0]}
"""Fields for `write_checkpoint`: layers with experts behind one without."""


def write_checkpoint(path: Path, *, seed: int = 0, **config: Any) -> Path:
    """A tiny Qwen2 checkpoint with random weights and the byte tokenizer; see EXPERTS for one with
    experts. Returns ``path``."""
    import torch
    from safetensors.torch import save_file

    raw: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"], "vocab_size": 264, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "rope_theta": 10_000.0,
        "tie_word_embeddings": True, **config}
    write_tokenizer(path)
    (path / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.ones(shape) if name.endswith("norm.weight")
               else torch.randn(shape, generator=generator) * 0.3
               for name, shape in _weight_shapes(raw).items()}
    save_file(weights, path / "model.safetensors")
    return path


def _weight_shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden = raw["hidden_size"]
    head_dim = hidden // raw["num_attention_heads"]
    rows = {"q": hidden, "k": raw["num_key_value_heads"] * head_dim}
    rows["v"] = rows["k"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (raw["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(raw["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        for name, size in rows.items():
            shapes[f"{base}self_attn.{name}_proj.weight"] = (size, hidden)
            shapes[f"{base}self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{base}self_attn.o_proj.weight"] = (hidden, hidden)
        for name, width in _mlps(raw, layer):
            shapes[f"{base}{name}.gate_proj.weight"] = (width, hidden)
            shapes[f"{base}{name}.up_proj.weight"] = (width, hidden)
            shapes[f"{base}{name}.down_proj.weight"] = (hidden, width)
        if "num_experts" in raw and layer not in raw["mlp_only_layers"]:
            shapes[f"{base}mlp.gate.weight"] = (raw["num_experts"], hidden)
            shapes[f"{base}mlp.shared_expert_gate.weight"] = (1, hidden)
        shapes[f"{base}input_layernorm.weight"] = (hidden,)
        shapes[f"{base}post_attention_layernorm.weight"] = (hidden,)
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (raw["vocab_size"], hidden)
    return shapes


def _mlps(raw: dict[str, Any], layer: int) -> list[tuple[str, int]]:
    """Names and widths of a layer's MLPs."""
    if "num_experts" not in raw or layer in raw["mlp_only_layers"]:
        return [("mlp", raw["intermediate_size"])]
    return [*((f"mlp.experts.{expert}", raw["moe_intermediate_size"])
              for expert in range(raw["num_experts"])),
            ("mlp.shared_expert", raw["shared_expert_intermediate_size"])]
