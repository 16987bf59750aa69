"""What RULER's tasks share: NVIDIA's strings, and the form of their examples.

Strings and sizes are those of NVIDIA/RULER (Apache-2.0). The prompt, the beginning of the answer
included, and the longest answer fit the length together, as RULER counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.eval.metrics import string_hits
from longspan.eval.task import Answer, Gold, Task, Verdict

NOISE = ("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back "
         "again.")
SHORT_LEN = 4096
"""Below this length RULER's lists of words have their short form."""


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt around its context, and the beginning of the answer."""

    text: str
    prefix: str

    def fill(self, **values: object) -> tuple[str, str, str]:
        """Return (before the context, after it, beginning of the answer)."""
        head, _, tail = self.text.partition("{context}")
        return head.format(**values), tail.format(**values), self.prefix.format(**values)


NIAH = Template(
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {type} afterwards.\n{context}\nWhat are all the special magic {type} "
    "for {query} mentioned in the provided text?",
    " The special magic {type} for {query} mentioned in the provided text are")
VARIABLES = Template(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
    "above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} "
    "variables are assigned the value {query}, they are: ")
COMMON_WORDS = Template(
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:")
FREQUENT_WORDS = Template(
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:")
QUESTIONS = Template(
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question "
    "based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}",
    " Answer:")


def join_answers(answers: Sequence[str]) -> str:
    """Join answers as a list in one line."""
    return ", ".join(answers)


class RulerTask(Task):
    """Scored by the share of the right answers that the text contains."""

    def reference(self, gold: Gold) -> str:
        """Return all answers, in the order of the questions, as RULER's solved examples list
        them."""
        return join_answers(gold.answers)

    def score(self, gold: Gold, answer: Answer) -> Verdict:
        """Score with RULER's ``string_match_all``."""
        hits = string_hits(answer.text, gold.answers)
        return Verdict(score=sum(hits) / len(hits), hits=hits)
