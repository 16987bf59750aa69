"""LongBench-Chat from local files: long questions of people, rated by a judge (THUDM, Apache-2.0).

The judge is any chat model; its rating from 1 to 10 is kept as a score from 0.1 to 1. Answers are
sampled greedily here, where LongBench-Chat samples at temperature 1.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from longspan.errors import LongspanError
from longspan.eval.data_files import find_file, items, read_json
from longspan.eval.prompt import Materials
from longspan.eval.task import Answer, Example, Gold, Task, Verdict
from longspan.eval.tasks.from_files import whole_prompt

SYSTEM = "You're a good assistant at evaluating the quality of texts."
RUBRIC = """[Instructions]
You are asked to evaluate the quality of the AI assistant's answers to user questions as an impartial judge, and your evaluation should take into account factors including correctness (high priority), helpfulness, accuracy, and relevance. The scoring principles are as follows:
1. Read the AI assistant's answer and compare the assistant's answer with the reference answer.
2. Identify all errors in the AI Assistant's answers and consider how much they affect the answer to the question.
3. Evaluate how helpful the AI assistant's answers are in directly answering the user's questions and providing the information the user needs.\x20
4. Examine any additional information in the AI assistant's answer to ensure that it is correct and closely related to the question. If this information is incorrect or not relevant to the question, points should be deducted from the overall score.

Please give an overall integer rating from 1 to 10 based on the above principles, strictly in the following format:"[[rating]]", e.g. "[[5]]".

[Question]
{question}

[Reference answer begins]
{reference}
[Reference answer ends]

Below are several assistants' answers and their ratings:

{shots}Please rate the following assistant answers based on the scoring principles and examples above:

[Assistant's answer begins]
{answer}
[Assistant's answer ends]

Rating:\x20"""  # noqa: E501
SHOT = ("[Assistant's answer begins]\n{answer}\n[Assistant's answer ends]\n\n"
        "Rating: [[{score}]]\n\n")
RATING = re.compile(r"\[\[([^\]]+)\]\]")
BEST_RATING = 10


@dataclass(frozen=True, kw_only=True)
class LongBenchChatTask(Task):
    """Open questions; `score` is left to `judge_messages` and `read_rating`."""

    name: str = "longbench-chat"
    max_tokens: int = 1024
    is_sized: ClassVar[bool] = False

    @property
    def is_binary(self) -> bool:
        """Ratings are fractions."""
        return False

    def num_documents(self, num_samples: int, materials: Materials) -> int:
        """Return at most as many as the file has."""
        return min(num_samples, len(self._cases(materials)))

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build the prompt of a case."""
        case = self._cases(materials)[index]
        shots = self._shots(materials, case["idx"])
        return [Example(
            prompt=whole_prompt(materials, case["prompt"], self), question=case["query"],
            gold=Gold(answers=(case["answer"],), facts={"question": case["query"], "shots": [
                {"answer": shot["answer"], "score": shot["score"]} for shot in shots]}))]

    def score(self, gold: Gold, answer: Answer) -> Verdict:
        """Give no score yet: a judge has to read it."""
        return Verdict(score=None, label="not judged")

    def _cases(self, materials: Materials) -> list[dict[str, Any]]:
        file = find_file(materials.data, ("test_cases.json",), self.name)
        return items(read_json(file), str(file), ("idx", "query", "prompt", "answer"))

    def _shots(self, materials: Materials, number: int) -> list[dict[str, Any]]:
        """Find the rated answers of a case, which the file has in the order of the cases'
        numbers."""
        file = find_file(materials.data, ("few_shots.json",), self.name)
        content = read_json(file)
        if not isinstance(content, list) or not 0 < number <= len(content):
            raise LongspanError(f"{file}: no rated answers of case {number} there; it belongs to "
                                "other cases")
        return items(content[number - 1], str(file), ("answer", "score"))


def judge_messages(gold: Gold, text: str) -> list[dict[str, str]]:
    """Write what the judge is asked about an answer."""
    shots = "".join(SHOT.format(**shot) for shot in gold.facts["shots"])
    prompt = RUBRIC.format(question=gold.facts["question"], reference=gold.answers[0],
                           shots=shots, answer=text)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]


def read_rating(reply: str) -> float | None:
    """Read the last rating in double brackets over the best one; None without a number from 1 to
    10."""
    found = RATING.findall(reply)
    number = re.search(r"\d+\.\d+|\d+", found[-1]) if found else None
    rating = float(number.group()) if number else 0.0
    return rating / BEST_RATING if 1 <= rating <= BEST_RATING else None
