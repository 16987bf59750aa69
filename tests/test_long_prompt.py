"""A trained model reads a prompt that is long enough for sparse prefill, by the road of every
user: tokens in, `LLM`, text out."""

from __future__ import annotations

from longspan import LLM, SamplingParams
from longspan.commands import demo

LENGTH, ANSWER_LEN = 40_000, 24


def test_nano_finds_two_numbers_in_a_prompt_read_sparsely() -> None:
    with LLM("nano", device="cpu", max_model_len=LENGTH + ANSWER_LEN, max_num_requests=1) as llm:
        examples = demo.build(llm.tokenizer, LENGTH, seed=3, num_facts=2)
        outputs = [llm.generate(example.prompt_ids, SamplingParams(max_tokens=ANSWER_LEN))[0]
                   for example in examples]
    first, second = outputs
    assert first.num_prompt_tokens == LENGTH and first.num_cached_tokens == 0
    assert first.density is not None and 0.01 < first.density < 0.2, "it was read sparsely"
    assert second.num_cached_tokens > 0.9 * LENGTH, "the document is in the prefix cache"
    assert [output.text.strip() for output in outputs] == [example.answer for example in examples]
