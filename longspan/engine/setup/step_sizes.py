"""Chooses how long prefill chunks are and how many requests run together, by the memory.

A pure function of the model, what was asked for, and the device's memory. Both sizes cost
workspace that the KV cache then lacks, and long chunks are faster: sparse attention selects once
for each. So the *settings* below are tried from the largest on, and the first one is taken under
which two contexts of the wanted length fit (so that a second long prompt need not wait for the
first one's end), or else the first one under which one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from longspan.config import EngineConfig, ModelConfig
from longspan.engine.control.scheduler import max_step_tokens
from longspan.engine.device.memory import DeviceMemory, MemoryPlan, no_fit, plan_memory


class StepSizes(NamedTuple):
    """One setting."""

    prefill_chunk_len: int
    """Prompt tokens of one request computed in one step."""
    max_num_requests: int
    """Requests computed together at the most."""

    def __str__(self) -> str:
        return (f"prefill_chunk_len {self.prefill_chunk_len:,} and max_num_requests "
                f"{self.max_num_requests}")


ROOMY = {"cuda": (StepSizes(131_072, 64), StepSizes(65_536, 64), StepSizes(32_768, 64)),
         "cpu": (StepSizes(16_384, 64),)}
"""Settings that cost no speed to speak of: two contexts are worth going down to the last one."""
MODEST = {"cuda": (StepSizes(32_768, 16), StepSizes(16_384, 16), StepSizes(8_192, 8),
                   StepSizes(4_096, 8)),
          "cpu": (StepSizes(16_384, 16), StepSizes(8_192, 8), StepSizes(4_096, 8))}
"""Further ones, for the sake of one context."""
SMALLEST = (StepSizes(4_096, 2), StepSizes(2_048, 1), StepSizes(1_024, 1))
"""The last ones, for a length that was asked for: they are slow, and win a few thousand tokens."""
WANTED_CONTEXTS = 2
NEARLY_LONGEST = 0.95
"""Where the checkpoint's claim is out of reach, a setting that holds this share of the longest
context possible is preferred to smaller ones."""
WORTHWHILE = 0.75
"""... but `SMALLEST` settings are taken all the same if the others hold less than this share."""
DENSE_CHUNK_LEN = 32_768
"""Longest chunk without selections: longer ones would win nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenSizes:
    """The setting in effect, and what led to it."""

    config: EngineConfig
    """With both sizes decided."""
    memory: MemoryPlan
    reason: str
    """Why it is not a larger setting; empty: there is none, or it was asked for."""


def choose_sizes(
    model: ModelConfig, config: EngineConfig, *, means: bool, is_sparse: bool,
    device: DeviceMemory, must_fit: bool = True,
) -> ChosenSizes:
    """Choose the sizes that ``config`` leaves open, and plan the memory.

    Args:
        model: with the DCA in effect.
        config: device and dtype are set.
        means: the caches hold block means too.
        is_sparse: prompts may prefill sparsely.
        must_fit: False: where nothing fits, the plan that would hold the longest context is
            returned, with its ``missing_bytes``.

    Raises `NotEnoughMemoryError` where no setting fits; the message says what would.
    """
    trials = Trials(model, config, means=means, device=device)
    found = trials.settings(is_sparse, config)
    wanted = trials.wanted_len
    for contexts in (WANTED_CONTEXTS, 1):
        for index, sizes in enumerate(found):
            count = min(contexts, sizes.max_num_requests)
            if (contexts == 1 or index < trials.num_roomy) and trials.holds(sizes, count):
                return trials.chosen(sizes, _reason(trials, found[:index], count))
    longest = trials.longest(found)
    if config.max_model_len is None:
        anyhow = [*found, *trials.smallest()]
        if trials.fitting_len(longest) < WORTHWHILE * trials.fitting_len(trials.longest(anyhow)):
            found, longest = anyhow, trials.longest(anyhow)
        enough = NEARLY_LONGEST * trials.fitting_len(longest)
        sizes = next(sizes for sizes in found if trials.fitting_len(sizes) >= enough)
        reason = f"{wanted:,} tokens, the checkpoint's claim, do not fit"
        return trials.chosen(sizes if enough else longest, reason, must_fit=must_fit)
    if must_fit:
        trials.refuse(is_sparse, longest)
    return trials.chosen(longest, "what was asked for fits under no setting", must_fit=False)


class Trials:
    """Memory plans of one engine under several settings."""

    def __init__(self, model: ModelConfig, config: EngineConfig, *, means: bool,
                 device: DeviceMemory) -> None:
        assert config.device is not None
        self._model, self._config, self._means, self._device = model, config, means, device
        self._kind = config.device.split(":")[0]
        self.wanted_len = config.max_model_len or model.max_position_embeddings
        self.num_roomy = 0
        self._plans: dict[StepSizes, MemoryPlan] = {}

    def settings(self, is_sparse: bool, config: EngineConfig) -> list[StepSizes]:
        """List the settings that leave what was asked for as it is, the largest first; the
        smallest ones only where a length was asked for."""
        base = ROOMY[self._kind][-1].prefill_chunk_len
        longest = max(base, self.wanted_len * 2 - 1) if is_sparse else DENSE_CHUNK_LEN
        roomy = [sizes for sizes in ROOMY[self._kind] if sizes.prefill_chunk_len <= longest]
        found = list(dict.fromkeys(
            self._keep(sizes, config) for sizes in [*roomy, *MODEST[self._kind]]))
        self.num_roomy = len({self._keep(sizes, config) for sizes in roomy})
        return [*found, *self.smallest(config)] if config.max_model_len else found

    def smallest(self, config: EngineConfig | None = None) -> list[StepSizes]:
        """List the smallest settings that leave what was asked for as it is."""
        return list(dict.fromkeys(self._keep(sizes, config or self._config) for sizes in SMALLEST))

    def longest(self, settings: Sequence[StepSizes]) -> StepSizes:
        """Return the setting that holds the longest context; of equal ones the first, and where
        none holds any, the one that lacks least."""
        return max(settings, key=lambda sizes: (self.fitting_len(sizes),
                                                min(0, self.plan(sizes).room_bytes)))

    def _keep(self, sizes: StepSizes, config: EngineConfig) -> StepSizes:
        chunk = config.prefill_chunk_len or self._fitted(sizes.prefill_chunk_len)
        return StepSizes(chunk, config.max_num_requests or sizes.max_num_requests)

    def _fitted(self, chunk_len: int) -> int:
        """Return a chunk of whole blocks. On GPUs its ends are ends of DCA's chunks, or the other
        way round, if contexts are longer than one of those: a chunk with such a border inside is
        selected for twice, in two segments."""
        size = self._config.block_size
        stride = self._model.dca.dca_chunk_len if self._model.dca else self.wanted_len
        if self._kind == "cuda" and stride < self.wanted_len:
            parts, times = -(-stride // chunk_len), max(1, chunk_len // stride)
            if stride % (parts * size) == 0:
                return stride * times // parts
        return max(1, chunk_len // size) * size

    def plan(self, sizes: StepSizes) -> MemoryPlan:
        """Plan for the wanted length, whether it fits or not."""
        if sizes not in self._plans:
            config = replace(self._with(sizes), max_model_len=self.wanted_len)
            self._plans[sizes] = self._plan(config, must_fit=False)
        return self._plans[sizes]

    def holds(self, sizes: StepSizes, num_contexts: int) -> bool:
        """Tell whether so many contexts of the wanted length fit."""
        plan = self.plan(sizes)
        return plan.room_bytes >= num_contexts * plan.context_bytes

    def fitting_len(self, sizes: StepSizes) -> int:
        """Return the longest context that would fit, tokens."""
        return self.plan(sizes).fitting_len

    def chosen(self, sizes: StepSizes, reason: str, *, must_fit: bool = True) -> ChosenSizes:
        """Make the engine's plan under a setting."""
        config = self._with(sizes)
        memory = self._plan(config, must_fit=must_fit)
        every = self.settings(True, replace(self._config, max_model_len=self.wanted_len))
        fitting = max(memory.fitting_len, *(self.fitting_len(other) for other in every))
        return ChosenSizes(config=config, memory=replace(memory, fitting_len=fitting),
                           reason=reason)

    def refuse(self, is_sparse: bool, longest: StepSizes) -> None:
        """Raise the error that says what would fit, and under which setting."""
        asked = self._config
        free = replace(asked, prefill_chunk_len=None, max_num_requests=None)
        for sizes in self.settings(is_sparse, free):
            if self.holds(sizes, 1):
                raise no_fit(self._with(longest), self.plan(longest), [
                    f"leave prefill_chunk_len and max_num_requests out: it fits with {sizes}"])
        length = self.fitting_len(longest)
        remedies = [f"lower max_model_len to {length}, which fits with {longest}"] if length else []
        raise no_fit(self._with(longest), self.plan(longest), remedies)

    def _with(self, sizes: StepSizes) -> EngineConfig:
        return replace(self._config, prefill_chunk_len=sizes.prefill_chunk_len,
                       max_num_requests=sizes.max_num_requests)

    def _plan(self, config: EngineConfig, *, must_fit: bool) -> MemoryPlan:
        assert config.prefill_chunk_len is not None and config.max_num_requests is not None
        return plan_memory(
            self._model, config, means=self._means, must_fit=must_fit, device=self._device,
            max_step_tokens=max_step_tokens(config.prefill_chunk_len, config.max_num_requests))


def _reason(trials: Trials, larger: Sequence[StepSizes], num_contexts: int) -> str:
    """Say what the next larger setting lacked."""
    if not larger:
        return ""
    plan = trials.plan(larger[-1])
    room = max(0, plan.room_bytes) // plan.kv_bytes_per_token
    times = f"{num_contexts} x " if num_contexts > 1 else ""
    return (f"{larger[-1]} would leave room for {room:,} tokens, and "
            f"{times}{trials.wanted_len:,} are wanted")
