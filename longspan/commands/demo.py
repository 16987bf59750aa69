"""`longspan demo`: hide numbers in a long text of this machine, ask for each, show what it cost."""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from longspan.commands.console import (
    per_second,
    percent,
    recall_rows,
    seconds,
    show_table,
)
from longspan.commands.generate import show
from longspan.engine.front.llm import LLM
from longspan.engine.request import RequestOutput, SamplingParams
from longspan.eval.task import Example
from longspan.eval.tasks.passkey import MAX_ANSWER_TOKENS, passkey_haystack, score_number
from longspan.eval.text import TextBank, TextTokenizer, python_text_roots
from longspan.units import in_gib

MAX_SEED = 1_000_000


def run(model: str, length: int, seed: int | None, num_facts: int, options: dict[str, Any]) -> bool:
    """Run the demonstration. True if every answer was right."""
    seed = secrets.randbelow(MAX_SEED) if seed is None else seed
    with LLM(model, max_model_len=length + MAX_ANSWER_TOKENS, max_num_requests=1,
             **options) as llm:
        examples = build(llm.tokenizer, length, seed, num_facts)
        _say(f"longspan demo: {model} on {llm.config.device}, seed {seed} (repeat with --seed)")
        _say(f"document: {length:,} tokens of Python's own library with {num_facts} numbers hidden "
             f"at depths {', '.join(percent(example.depth) for example in examples)}")
        outputs = list(_ask_all(llm, examples))
        peak = llm.stats().peak_memory_bytes
    _report(examples, outputs, peak)
    num_right = sum(_is_right(e, o) for e, o in zip(examples, outputs, strict=True))
    _say(f"{num_right} of {num_facts} right")
    return num_right == num_facts


def build(tokenizer: TextTokenizer, length: int, seed: int, num_facts: int) -> list[Example]:
    """Prompts of exactly `length` tokens over one document, facts at random depths."""
    rng = random.Random(f"demo:{seed}")
    bank = TextBank.from_roots(python_text_roots(), tokenizer)
    depths = [rng.random() for _ in range(num_facts)]
    return passkey_haystack(bank, tokenizer, num_tokens=length, depths=depths, rng=rng)


def _ask_all(llm: LLM, examples: Sequence[Example]) -> Iterator[RequestOutput]:
    """Ask in order: the first computes the document, the others find it in the prefix cache."""
    params = SamplingParams(max_tokens=MAX_ANSWER_TOKENS)
    for number, example in enumerate(examples, 1):
        _say("")
        _say(f"question {number}: {example.question}")
        events = llm.stream(example.prompt_ids, params)
        output = show(events, title="reading" if number == 1 else "re-reading")
        verdict = "right" if _is_right(example, output) else f"wrong: it is {example.answer}"
        _say(f"  {verdict}, first token after {seconds(output.ttft_s)}")
        yield output


def _on_one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def _say(text: str) -> None:
    """Write one line at once, so that logs hold it before the progress that follows."""
    print(text, flush=True)


def _is_right(example: Example, output: RequestOutput) -> bool:
    return score_number(output.text, example.answer) == 1.0


def _report(examples: Sequence[Example], outputs: Sequence[RequestOutput], peak_bytes: int) -> None:
    first = outputs[0]
    computed = first.num_prompt_tokens - first.num_cached_tokens
    rates = [output.decode_tokens_per_s for output in outputs if output.decode_tokens_per_s]
    _say("")
    columns = ("question", "depth", "hidden", "answer", "", "first token", "cached")
    show_table("answers", columns, [
        (number, percent(example.depth), example.answer, _on_one_line(output.text),
         "right" if _is_right(example, output) else "WRONG", seconds(output.ttft_s),
         f"{output.num_cached_tokens:,}")
        for number, (example, output) in enumerate(zip(examples, outputs, strict=True), 1)])
    show_table("what it cost", ("", ""), [
        ("prompt", f"{first.num_prompt_tokens:,} tokens"),
        ("time to first token", seconds(first.ttft_s)),
        ("prefill", per_second(computed / first.ttft_s if first.ttft_s else None)),
        ("decode", per_second(sum(rates) / len(rates) if rates else None)),
        ("attention density", percent(first.density)),
        *recall_rows(first.recall),
        ("peak memory", in_gib(peak_bytes)),
    ])
