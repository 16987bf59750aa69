"""One prefill measured in a process of its own, so that its peak memory is its own.

``python -m longspan.bench.engine.measure JSON`` prints one JSON object on its last line.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from array import array
from dataclasses import asdict, dataclass
from typing import Any

from longspan.commands.console import note
from longspan.engine.device.memory import peak_memory_bytes
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import LongspanError
from longspan.eval.tasks.passkey import passkey_haystack
from longspan.eval.text import TextBank, python_text_roots
from longspan.model.weights import resolve_checkpoint
from longspan.units import GIB

WARMUP_TOKENS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One prefill."""

    model: str
    impl: str
    """``sparse``, ``dense`` or ``transformers``."""
    num_tokens: int
    threads: int


def in_subprocess(measurement: Measurement) -> dict[str, Any]:
    """Run a measurement; returns its row. Raises `LongspanError` when it fails."""
    note(f"measuring {measurement.impl}, {measurement.num_tokens:,} tokens")
    command = [sys.executable, "-m", "longspan.bench.engine.measure",
               json.dumps(asdict(measurement))]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise LongspanError(f"measuring {measurement.impl} at {measurement.num_tokens} tokens "
                            f"failed with status {result.returncode}; its messages are above")
    row: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    note(f"  {row['prefill_s']:.1f} s, {row['peak_memory_gib']:.2f} GiB")
    return row


def measure(measurement: Measurement) -> dict[str, Any]:
    """Return the row of one measurement, after a short warm-up."""
    tokenizer = Tokenizer(resolve_checkpoint(measurement.model))
    bank = TextBank.from_roots(python_text_roots(), tokenizer)
    warm = _prompt(bank, tokenizer, min(WARMUP_TOKENS, measurement.num_tokens), "warm-up")
    prompt = _prompt(bank, tokenizer, measurement.num_tokens, "measured")
    del bank
    prefill = _with_transformers if measurement.impl == "transformers" else _with_longspan
    prefill_s, density = prefill(measurement, warm, prompt)
    return {**asdict(measurement), "prefill_s": round(prefill_s, 3),
            "density": None if density is None else round(density, 4),
            "peak_memory_gib": round(peak_memory_bytes() / GIB, 3)}


def passkey_prompt(model: str, num_tokens: int) -> array[int]:
    """Build a prompt of the passkey task from Python's library."""
    tokenizer = Tokenizer(resolve_checkpoint(model))
    bank = TextBank.from_roots(python_text_roots(), tokenizer)
    return _prompt(bank, tokenizer, num_tokens, "measured")


def _prompt(
    bank: TextBank, tokenizer: Tokenizer, num_tokens: int, name: str
) -> array[int]:
    """Build a prompt of the passkey task: sparse patterns depend on what the text is."""
    rng = random.Random(f"{name}:{num_tokens}")
    return passkey_haystack(bank, tokenizer, num_tokens=num_tokens, depths=[0.5],
                            rng=rng)[0].prompt_ids


def _with_longspan(
    measurement: Measurement, warm: array[int], prompt: array[int]
) -> tuple[float, float | None]:
    from longspan.engine.front.llm import LLM
    from longspan.engine.request import SamplingParams

    params = SamplingParams(max_tokens=1)
    with LLM(measurement.model, device="cpu", dtype="float32", attention=measurement.impl,
             num_threads=measurement.threads, max_model_len=len(prompt) + 1) as llm:
        llm.generate([warm], params)
        output = llm.generate([prompt], params)[0]
    assert output.ttft_s is not None and not output.num_cached_tokens
    return output.ttft_s, output.density


def _with_transformers(
    measurement: Measurement, warm: array[int], prompt: array[int]
) -> tuple[float, float | None]:
    """Measure transformers on the same checkpoint and type: scaled-dot-product attention, KV cache
    kept, and logits of the last token only, as generation needs them."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(measurement.threads)
    model = AutoModelForCausalLM.from_pretrained(
        resolve_checkpoint(measurement.model), dtype=torch.float32,
        attn_implementation="sdpa").eval()
    started_s = 0.0
    with torch.inference_mode():
        for ids in (warm, prompt):
            started_s = time.monotonic()
            model(torch.tensor([ids.tolist()]), use_cache=True, logits_to_keep=1)
    return time.monotonic() - started_s, 1.0


if __name__ == "__main__":
    print(json.dumps(measure(Measurement(**json.loads(sys.argv[1])))))
