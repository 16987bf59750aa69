"""`longspan demo`: hide numbers in a long text of this machine, ask for each, show what it cost."""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from longspan.commands.console import (
    per_second,
    percent,
    recall_rows,
    seconds,
    show_table,
)
from longspan.commands.documents import show_documents
from longspan.commands.generate import show
from longspan.documents.gather import Document, as_prompt, gather
from longspan.engine.front.llm import LLM
from longspan.engine.request import RequestOutput, SamplingParams
from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import LongspanError
from longspan.eval.prompt import PLAIN, Prompt
from longspan.eval.task import Example, Gold
from longspan.eval.tasks.passkey import (
    INSTRUCTION,
    MAX_ANSWER_TOKENS,
    NEEDLE,
    QUESTION,
    passkey_haystack,
    score_number,
)
from longspan.eval.text import Piece, TextBank, TextTokenizer, python_text_roots
from longspan.eval.words import draw_keys, draw_number
from longspan.units import in_gib

MAX_SEED = 1_000_000
DEFAULT_LENGTH = 131_072


def run(
    model: str, length: int | None, seed: int | None, num_facts: int, documents: Sequence[str],
    options: dict[str, Any],
) -> bool:
    """Run the demonstration. True if every answer was right.

    Args:
        length: of the prompt, tokens; None: 131,072, or what the documents take.
        documents: files and folders to hide numbers in; empty: Python's own library.
    """
    seed = secrets.randbelow(MAX_SEED) if seed is None else seed
    if documents:
        return _run_on_documents(model, length, seed, num_facts, documents, options)
    length = DEFAULT_LENGTH if length is None else length
    with LLM(model, max_model_len=length + MAX_ANSWER_TOKENS, max_num_requests=1,
             **options) as llm:
        examples = build(llm.tokenizer, length, seed, num_facts)
        _say(f"longspan demo: {model} on {llm.config.device}, seed {seed} (repeat with --seed)")
        _say(f"document: {length:,} tokens of Python's own library with {num_facts} numbers hidden "
             f"at depths {', '.join(percent(example.depth) for example in examples)}")
        outputs = list(_ask_all(llm, examples))
        peak = llm.stats().peak_memory_bytes
    return _verdict(examples, outputs, peak)


def _run_on_documents(
    model: str, length: int | None, seed: int, num_facts: int, documents: Sequence[str],
    options: dict[str, Any],
) -> bool:
    """Run it on a person's own files, whole and under their names."""
    if length is not None:
        raise LongspanError("--length and --document: the prompt is as long as the documents are; "
                            "leave --length out")
    gathering = gather(documents)
    with LLM(model, max_num_requests=1, **options) as llm:
        show_documents(gathering, lambda text: len(llm.tokenizer.encode(text)))
        examples = hide(llm.tokenizer, gathering.documents, seed, num_facts)
        _say(f"longspan demo: {model} on {llm.config.device}, seed {seed} (repeat with --seed)")
        outputs = list(_ask_all(llm, examples))
        peak = llm.stats().peak_memory_bytes
    return _verdict(examples, outputs, peak)


def hide(
    tokenizer: Tokenizer, documents: Sequence[Document], seed: int, num_facts: int
) -> list[Example]:
    """Hide one number at a random line of each of some documents, and ask for each."""
    rng = random.Random(f"demo:{seed}")
    lines = [(index, place) for index, document in enumerate(documents)
             for place in range(document.text.count("\n") + 1)]
    keys = draw_keys(rng, num_facts, set())
    facts = [(key, draw_number(rng), *rng.choice(lines)) for key in keys]
    texts = [document.text.split("\n") for document in documents]
    for key, value, index, place in sorted(facts, key=lambda fact: -fact[3]):
        texts[index].insert(place, NEEDLE.format(key=key, value=value).rstrip())
    whole = as_prompt([Document(document.name, "\n".join(text))
                       for document, text in zip(documents, texts, strict=True)])
    examples = []
    for key, value, *_ in facts:
        question, needle = QUESTION.format(key=key), NEEDLE.format(key=key, value=value).rstrip()
        text = f"{whole}\n\n{question} {INSTRUCTION}"
        ids = np.asarray(tokenizer.encode_chat([{"role": "user", "content": text}]), np.int32)
        examples.append(Example(
            prompt=Prompt([Piece(text, ids)], PLAIN), gold=Gold(answers=(value,)),
            question=question, positions=(len(ids) * whole.index(needle) // len(whole),)))
    return examples


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


def _verdict(
    examples: Sequence[Example], outputs: Sequence[RequestOutput], peak_bytes: int
) -> bool:
    _report(examples, outputs, peak_bytes)
    num_right = sum(_is_right(e, o) for e, o in zip(examples, outputs, strict=True))
    _say(f"{num_right} of {len(examples)} right")
    return num_right == len(examples)


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
