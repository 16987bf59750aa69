"""A runner that keeps decode steps on the device answers as one that builds each of them anew.

Random schedules on a tiny model: requests arrive (steps that prefill are computed eagerly), end,
change places, are left out of a step; tokens run ahead or come from the host, which now and then
has another opinion; some rows are sampled with penalties, biases and log-probabilities.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longspan.attention.metadata import AttentionMetadata
from longspan.config import EngineConfig, ModelConfig
from longspan.engine.device.graphs import Compute, DecodeGraphs, DecodeState
from longspan.engine.device.memory import DeviceMemory, plan_memory
from longspan.engine.device.runner import Runner
from longspan.engine.resolve import resolve_positions
from longspan.engine.step import RowSampling, SamplingExtras, ScheduledBatch, ScheduledSlice
from tests.doubles import write_checkpoint

BLOCK, MAX_LEN, NUM_SLOTS, VOCAB_SIZE = 8, 256, 5, 264
TABLE_LEN = MAX_LEN // BLOCK
DCA = {"chunk_size": 48, "local_size": 16, "original_max_position_embeddings": 40}
EXTRAS = (
    None, None, SamplingExtras(logprobs=2), SamplingExtras(presence_penalty=1.5),
    SamplingExtras(frequency_penalty=0.5, logit_bias=((7, 3.0),)))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), dual_chunk_attention_config=DCA)


def load(path: Path) -> Runner:
    model = ModelConfig.from_dir(path)
    config = EngineConfig(
        model=str(path), device="cpu", dtype="float32", prefill_chunk_len=64, block_size=BLOCK,
        max_model_len=MAX_LEN, max_num_requests=NUM_SLOTS)
    memory = plan_memory(model, config, max_step_tokens=128, means=False,
                         device=DeviceMemory(total_bytes=2**34, free_bytes=2**34))
    memory = replace(memory, num_blocks=NUM_SLOTS * TABLE_LEN)
    return Runner.load(path, model, config, memory, plan=None,
                       dca=resolve_positions("auto", model))


class CountingState(DecodeState):
    """Knows how often it was loaded."""

    num_loads = 0

    def load(self, items: list[ScheduledSlice], size: int) -> None:  # type: ignore[override]
        """Load, and count."""
        self.num_loads += 1
        super().load(items, size)


def use_graphs(runner: Runner) -> CountingState:
    """Decode steps as on a GPU, only that a replay computes kernel by kernel."""
    state = CountingState(runner._last_tokens, max_blocks=TABLE_LEN, block_size=BLOCK,
                          head_dim=runner._head_dim, dca=runner._dca)

    def forward(token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        """CPUs compute no padding."""
        count = int(metadata.slot_mapping.ge(0).sum())
        logits = torch.zeros(len(token_ids), VOCAB_SIZE)
        if count:
            logits[:count] = runner._decode(token_ids[:count], _head(metadata, count))
        return logits

    runner._graphs = DecodeGraphs(forward, state, _record)
    return state


def _record(step: Compute) -> Compute:
    step()  # as before a capture
    return step


def _head(metadata: AttentionMetadata, count: int) -> AttentionMetadata:
    group = metadata.decode
    assert group is not None
    return replace(
        metadata, positions=metadata.positions[:count], slot_mapping=metadata.slot_mapping[:count],
        decode=replace(
            group, block_tables=group.block_tables[:count], scales=group.scales[:count],
            context_lens=group.context_lens[:count]))


class Owner:
    """A request in a slot."""

    def __init__(self, name: str, slot: int, source: random.Random) -> None:
        self.name, self.slot = name, slot
        self.prompt = array("i", [source.randrange(VOCAB_SIZE)
                                  for _ in range(source.randrange(1, 60))])
        self.length = 0
        self.blocks = list(range(slot * TABLE_LEN, (slot + 1) * TABLE_LEN))
        source.shuffle(self.blocks)
        self.extras = source.choice(EXTRAS)
        self.sampling = RowSampling(
            temperature=source.choice([0.0, 0.0, 0.8]), top_k=source.choice([0, 20]), top_p=0.9,
            min_p=0.01, seed=source.randrange(1000))
        self.latest = -1

    def slice(self, token: int | None) -> ScheduledSlice:
        """Its next step; ``token`` of a decode, None: run ahead."""
        is_prefill = self.length == 0
        known = array("i", [] if token is None else [token])
        return ScheduledSlice(
            request_id=self.name, token_ids=self.prompt if is_prefill else known, slot=self.slot,
            cached_len=self.length, prompt_len=len(self.prompt), block_ids=self.blocks,
            sparse=False, sampling=self.sampling, extras=self.extras if is_prefill else None)


class World:
    """Two runners that are given the same steps."""

    def __init__(self, path: Path, seed: int) -> None:
        self.source = random.Random(seed)
        self.eager, self.graphs = load(path), load(path)
        self.state = use_graphs(self.graphs)
        self.owners = list[Owner]()
        self.num_steps = self.num_decode_steps = 0

    def step(self) -> None:
        """Something changes, or nothing; then a step on both."""
        source = self.source
        slots = sorted({*range(NUM_SLOTS)} - {owner.slot for owner in self.owners})
        new = list[Owner]()
        if slots and (not self.owners or source.random() < 0.08):
            new.append(Owner(f"request {self.num_steps}", source.choice(slots), source))
        if self.owners and source.random() < 0.04:
            self.owners.remove(source.choice(self.owners))
        if source.random() < 0.04:
            source.shuffle(self.owners)
        self.owners = [owner for owner in self.owners if owner.length < MAX_LEN - 2]
        present = [owner for owner in self.owners if source.random() < 0.99]
        host = source.random()
        items = [owner.slice(None if host < 0.7 else self.token_of(owner))
                 for owner in (*new, *present)]
        self.owners += new
        if items:
            self.compute([*new, *present], items)

    def token_of(self, owner: Owner) -> int:
        """What the host says was sampled; rarely it is something else."""
        return owner.latest if self.source.random() < 0.95 else self.source.randrange(VOCAB_SIZE)

    def compute(self, owners: list[Owner], items: list[ScheduledSlice]) -> None:
        """On both: the same tokens and log-probabilities."""
        batch = ScheduledBatch(step_id=self.num_steps, slices=tuple(items))
        wanted, found = self.eager.execute(batch), self.graphs.execute(batch)
        assert found.token_ids == wanted.token_ids
        assert [row and row.top_ids for row in found.logprobs] == \
            [row and row.top_ids for row in wanted.logprobs]
        assert self.graphs._last_tokens[:NUM_SLOTS].equal(self.eager._last_tokens[:NUM_SLOTS])
        for owner, item, token in zip(owners, items, found.token_ids, strict=True):
            owner.length, owner.latest = item.context_len, token
        self.num_steps += 1
        self.num_decode_steps += not batch.prefills


@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_those_of_steps_built_anew(path: Path, seed: int) -> None:
    world = World(path, seed)
    for _ in range(250):
        world.step()
    assert world.num_decode_steps > 150
    assert 10 < world.state.num_loads < world.num_decode_steps / 2
    for mine, other in zip(world.graphs._stages[0].caches, world.eager._stages[0].caches,
                           strict=True):
        for owner in world.owners:
            places = [owner.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(owner.length)]
            for one, two in ((mine.k, other.k), (mine.v, other.v)):
                assert one.flatten(0, 1)[places].allclose(
                    two.flatten(0, 1)[places], atol=1e-4, rtol=1e-4)


def test_recording_touches_no_request(path: Path) -> None:
    """Graphs that are recorded between steps leave tokens, keys and answers alone."""
    runner, other = load(path), load(path)
    use_graphs(runner)
    owner = Owner("a", 0, random.Random(5))
    for step in range(12):
        batch = ScheduledBatch(step_id=step, slices=(owner.slice(None),))
        token_ids = runner.execute(batch).token_ids
        assert token_ids == other.execute(batch).token_ids
        owner.length += batch.num_tokens
        runner.record_graphs()
        assert runner._graphs is not None
        if step % 3 == 0:
            runner._graphs._graphs.clear()
