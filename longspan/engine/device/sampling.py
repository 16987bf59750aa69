"""The runner's side of sampling: what requests ask for beyond `longspan.ops.sampling.sample`.

State is kept by the scheduler's slots: a request's extras come with its first sampling slice and
stay until the next request begins in its slot. Counts of sampled tokens live on the device and are
brought up to date by the sampling itself, so that steps may run ahead of the host; only rows that
follow a grammar wait for it, since the grammar is stepped on the host. Nothing here waits for the
device.
"""

from __future__ import annotations

import logging
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from msgspec.structs import replace
from torch import Tensor

from longspan.attention.upload import upload
from longspan.engine.device.prompt_logprobs import ScoredRows
from longspan.engine.step import RowLogprobs, SamplingExtras, ScheduledSlice
from longspan.engine.text.grammar import Grammar, Grammars
from longspan.errors import LongspanError, RequestFailedError
from longspan.ops.sampling.logits import Penalties, keep_allowed, penalize, top_logprobs
from longspan.ops.sampling.sample import NO_TOKEN, SamplingRows, sample

Result = TypeVar("Result")
logger = logging.getLogger("longspan.engine")
HISTORY_STEP = 16
"""Slots by which the tables of penalised requests grow."""


class LogprobRows(NamedTuple):
    """Log-probabilities of the m rows that asked for them, each with K alternatives."""

    rows: tuple[int, ...]
    """[m] places among the step's sampled tokens."""
    num_top: tuple[int, ...]
    """[m] alternatives wanted, at most K."""
    chosen: Tensor
    """[m] fp32"""
    top_ids: Tensor
    """[m, K] int64"""
    top: Tensor
    """[m, K] fp32"""


class SampledTokens(NamedTuple):
    """What a step sampled, on the device until `cpu`."""

    token_ids: Tensor
    """[n] int64; `NO_TOKEN` where there is none."""
    logprobs: LogprobRows | None
    failures: dict[int, str] = {}
    """As in `StepResult`."""
    scored: tuple[ScoredRows, ...] = ()
    """Log-probabilities of prompts."""

    def cpu(self, *, non_blocking: bool = False) -> SampledTokens:
        """Copy to the host; with ``non_blocking`` the copy is complete when the stream is."""
        def fetch(tensor: Tensor) -> Tensor:
            return tensor.to("cpu", non_blocking=non_blocking)

        found = self.logprobs
        return SampledTokens(fetch(self.token_ids), None if found is None else LogprobRows(
            found.rows, found.num_top, fetch(found.chosen), fetch(found.top_ids),
            fetch(found.top)), self.failures,
            tuple(rows.cpu(non_blocking=non_blocking) for rows in self.scored))

    def as_tuples(self) -> tuple[tuple[int, ...], tuple[RowLogprobs | None, ...]]:
        """Convert for a `StepResult`; waits for the device where the tokens are still there."""
        token_ids = tuple(self.token_ids.tolist())
        if self.logprobs is None:
            return token_ids, ()
        found = self.logprobs
        rows: list[RowLogprobs | None] = [None] * len(token_ids)
        values = zip(found.rows, found.num_top, found.chosen.tolist(), found.top_ids.tolist(),
                     found.top.tolist(), strict=True)
        for row, num_top, chosen, ids, top in values:
            rows[row] = RowLogprobs(chosen, tuple(ids[:num_top]), tuple(top[:num_top]))
        return token_ids, tuple(rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """A request in a slot."""

    extras: SamplingExtras
    grammar: Grammar | None

    @property
    def is_penalized(self) -> bool:
        extras = self.extras
        return (extras.presence_penalty != 0 or extras.frequency_penalty != 0
                or extras.repetition_penalty != 1)


@dataclass(frozen=True, slots=True)
class _Row:
    """A sampled row that asks for extras."""

    index: int
    item: ScheduledSlice
    state: _State


class _Failures(dict[int, str]):
    """Rows for which the host's own work has failed, and why. They get no token; the others are
    sampled as ever."""

    def watch(self, index: int, work: Callable[[], Result]) -> Result | None:
        """Call work that concerns one row alone. None: it has failed, and the log says where."""
        try:
            return work()
        except LongspanError as error:
            self[index] = str(error)
        except Exception as error:
            logger.exception("sampling has failed for one request")
            text = " ".join(str(error).split())
            self[index] = f"sampling has failed for this request ({type(error).__name__}: {text})"
        return None


class Sampler:
    """Samples the tokens of a step.

    Args:
        grammars: called when the first request with a JSON schema arrives.
    """

    def __init__(
        self, *, vocab_size: int, device: torch.device | str, grammars: Callable[[], Grammars],
    ) -> None:
        self._device = torch.device(device)
        self._states: dict[int, _State] = {}
        self._history = _History(vocab_size, self._device)
        self._load_grammars = grammars
        self._loading = threading.Lock()
        self._grammars: Grammars | None = None

    def sample(
        self, logits: Tensor, items: Sequence[ScheduledSlice], rows: SamplingRows, *,
        all_greedy: bool,
    ) -> SampledTokens:
        """Choose a token for each slice that samples.

        Args:
            logits: [n, V] fp32; changed in place where a row asks for it.
            items: [n] the slices, in order.
            rows: the same slices' parameters on the device.
            all_greedy: every temperature is 0.

        Order: repetition, frequency and presence penalty, bias, ``min_tokens``, grammar, then the
        temperature and the filters. Log-probabilities are of the logits as they come in.
        """
        failures = _Failures()
        asking = [_Row(index, item, state) for index, item in enumerate(items)
                  if (state := self._state_of(index, item, failures)) is not None]
        if not asking and not failures:
            return SampledTokens(sample(logits, rows, all_greedy=all_greedy), None)
        wanted = [row for row in asking if row.state.extras.logprobs is not None]
        found = self._logprobs(logits, wanted) if wanted else None
        penalized = [row for row in asking if row.state.is_penalized]
        self._penalize(logits, penalized)
        self._shift(logits, asking)
        self._constrain(
            logits, [row for row in asking if row.state.grammar is not None], failures)
        token_ids = sample(logits, rows, all_greedy=all_greedy)
        if penalized:
            places, slots = self._places(penalized)
            self._history.count(slots, token_ids[places].clamp_min(0))
        if failures:
            places = upload(torch.tensor(list(failures)), self._device)
            token_ids.index_fill_(0, places, NO_TOKEN)
        return SampledTokens(token_ids, None if found is None else _choose(
            wanted, found, token_ids[self._indices(wanted)]), dict(failures))

    def asks(self, items: Sequence[ScheduledSlice]) -> bool:
        """Return whether a decode slice needs more than `longspan.ops.sampling.sample`."""
        return any(item.slot in self._states for item in items)

    def prepare(self, constraint: str | None = None) -> None:
        """Read the vocabulary for grammars and compile a constraint, if one is given, before a
        request asks for it; any thread may. Raises `LongspanError` where that cannot be done."""
        grammars = self._all_grammars()
        grammars.load()
        if constraint is not None:
            grammars.check(constraint)

    # -- state ---------------------------------------------------------------------------------

    def _state_of(self, index: int, item: ScheduledSlice, failures: _Failures) -> _State | None:
        if item.context_len == item.prompt_len:
            self._states.pop(item.slot, None)
            if item.extras is not None:
                self._begin(index, item.slot, item.extras, failures)
        return self._states.get(item.slot)

    def _begin(self, index: int, slot: int, extras: SamplingExtras, failures: _Failures) -> None:
        schema = extras.constraint
        grammar = None if schema is None else failures.watch(index, lambda: self._grammar(schema))
        if index in failures:
            return
        state = _State(extras=extras, grammar=grammar)
        if state.is_penalized:  # only the history needs the prompt, 4 MB for a million tokens
            self._history.begin(slot, extras)
            state = _State(extras=replace(extras, prompt_ids=array("i")), grammar=grammar)
        self._states[slot] = state

    def _grammar(self, constraint: str) -> Grammar:
        return self._all_grammars().start(constraint)

    def _all_grammars(self) -> Grammars:
        with self._loading:
            if self._grammars is None:
                self._grammars = self._load_grammars()
            return self._grammars

    # -- changes to logits ---------------------------------------------------------------------

    def _penalize(self, logits: Tensor, penalized: Sequence[_Row]) -> None:
        if penalized:
            places, slots = self._places(penalized)
            logits[places] = self._history.penalize(logits[places], slots)

    def _shift(self, logits: Tensor, asking: Sequence[_Row]) -> None:
        """Add biases, and take away ends that come too early."""
        places, tokens, values = list[int](), list[int](), list[float]()
        for row in asking:
            extras = row.state.extras
            changes = dict(extras.logit_bias)
            if row.item.context_len - row.item.prompt_len < extras.min_tokens:
                changes.update(dict.fromkeys(extras.end_ids, -torch.inf))
            places += [row.index] * len(changes)
            tokens += changes.keys()
            values += changes.values()
        if places:
            cells, shift = upload(
                (torch.tensor([places, tokens]), torch.tensor(values, dtype=torch.float32)),
                self._device)
            logits[cells[0], cells[1]] += shift  # no cell comes twice

    def _constrain(self, logits: Tensor, guided: Sequence[_Row], failures: _Failures) -> None:
        """Leave only the tokens that the grammars allow."""
        masks = [failures.watch(row.index, partial(_advance, row)) for row in guided]
        kept = [(row, mask) for row, mask in zip(guided, masks, strict=True) if mask is not None]
        if kept:
            packed = bytearray(b"".join(mask for _, mask in kept))
            words = torch.frombuffer(packed, dtype=torch.int32).view(len(kept), -1)
            bits = upload(words, self._device)
            places = self._indices([row for row, _ in kept])
            logits[places] = keep_allowed(logits[places], bits)

    def _logprobs(
        self, logits: Tensor, wanted: Sequence[_Row]
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_top = max(row.state.extras.logprobs or 0 for row in wanted)
        return top_logprobs(logits[self._indices(wanted)], num_top)

    def _indices(self, rows: Sequence[_Row]) -> Tensor:
        return upload(torch.tensor([row.index for row in rows]), self._device)

    def _places(self, rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
        """Return places in the step, and slots, as [2, p] on the device."""
        both = torch.tensor([[row.index for row in rows], [row.item.slot for row in rows]])
        places, slots = upload(both, self._device)
        return places, slots


class _History:
    """Which tokens the penalised requests have had, by slot; allocated when the first one comes."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._penalties = torch.zeros(0, 3, device=device)

    def begin(self, slot: int, extras: SamplingExtras) -> None:
        """Forget the slot's last request; store the prompt and penalties of the new one."""
        self._grow(slot + 1)
        self._counts[slot] = 0
        self._in_prompt[slot] = False
        if extras.prompt_ids:
            prompt = torch.frombuffer(extras.prompt_ids, dtype=torch.int32)
            # an assignment of True would wait for the device
            self._in_prompt[slot].index_fill_(0, upload(prompt, self._device).long(), True)
        self._penalties[slot] = upload(torch.tensor([
            extras.presence_penalty, extras.frequency_penalty, extras.repetition_penalty,
        ]), self._device)

    def penalize(self, logits: Tensor, slots: Tensor) -> Tensor:
        """Penalise the logits [p, V] of the requests in these slots."""
        penalties = Penalties(*self._penalties[slots].unbind(dim=1))
        return penalize(logits, self._counts[slots], self._in_prompt[slots], penalties)

    def count(self, slots: Tensor, token_ids: Tensor) -> None:
        """Count sampled tokens. [p] each, no slot twice."""
        self._counts[slots, token_ids] += 1

    def _grow(self, num_slots: int) -> None:
        if num_slots > len(self._counts):
            num_rows = _history_rows(num_slots)
            self._counts = _extended(self._counts, num_rows)
            self._in_prompt = _extended(self._in_prompt, num_rows)
            self._penalties = _extended(self._penalties, num_rows)


def history_bytes(vocab_size: int, num_slots: int) -> int:
    """Return the bytes of the history on the device with a penalised request in every slot."""
    return _history_rows(num_slots) * (vocab_size * (4 + 1) + 3 * 4)


def _history_rows(num_slots: int) -> int:
    return -(-num_slots // HISTORY_STEP) * HISTORY_STEP


def _extended(table: Tensor, num_rows: int) -> Tensor:
    longer = table.new_zeros(num_rows, table.shape[1])
    longer[:len(table)] = table
    return longer


def _advance(row: _Row) -> bytes:
    """Tell the grammar the token that this slice computed; returns the mask of the next."""
    grammar = row.state.grammar
    assert grammar is not None
    if row.item.context_len > row.item.prompt_len:
        grammar.push(row.item.token_ids[-1])
    mask = grammar.mask()
    if mask is None:
        raise RequestFailedError("the completion cannot go on as its json_schema asks; a simpler "
                                 "schema may help")
    return mask


def _choose(
    wanted: Sequence[_Row], found: tuple[Tensor, Tensor, Tensor], token_ids: Tensor
) -> LogprobRows:
    """Log-probabilities of the sampled tokens, [m], out of those of all tokens."""
    logprobs, top_ids, top = found
    sampled = token_ids.clamp_min(0)  # NO_TOKEN has none
    return LogprobRows(
        rows=tuple(row.index for row in wanted),
        num_top=tuple(row.state.extras.logprobs or 0 for row in wanted),
        chosen=logprobs.gather(1, sampled[:, None])[:, 0], top_ids=top_ids, top=top)
