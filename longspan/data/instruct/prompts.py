"""What models are told; a change of a text is a new version, which samples carry.

The forms are as plain as possible, so that small models keep to them: one thing at a time, the
document first and the task behind it, answers in lines that begin with a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text with ``<<names>>`` to fill in."""

    name: str
    version: int
    text: str

    @property
    def label(self) -> str:
        """Name and version."""
        return f"{self.name}/{self.version}"

    def fill(self, values: Mapping[str, object]) -> str:
        """Return the text with its values."""
        text = self.text
        for name in values:
            assert f"<<{name}>>" in text, f"{self.label} has no {name}"
        pieces = text.split("<<")
        filled = [pieces[0]]
        for piece in pieces[1:]:
            name, _, rest = piece.partition(">>")
            filled += [str(values[name]), rest]
        return "".join(filled)


QUERY = Prompt("query", 1, """Here is a part of a long document.

<part>
<<segment>>
</part>

Write <<wish>>
The reader has the whole document and does not know which part you saw. So name the thing, person, \
place, function or topic that you ask about, and never write "this part", "the passage", "the \
text" or "above". Then give the answer, in one to three sentences, from the part alone.

Write exactly two lines:
Question: ...
Answer: ...""")
KEYWORDS = Prompt("keywords", 1, """Question about a long document: <<query>>

Write up to eight words to search the document for, in the language of the document, on one line, \
with commas between. Write nothing else.""")
READ = Prompt("read", 1, """Part <<number>> of <<count>> of a document:

<part>
<<chunk>>
</part>

Question: <<query>>

Copy the sentences of this part that help to answer the question, word by word, one a line. If no \
sentence helps, write only: None""")
STEP = Prompt("step", 1, """Question about a long document: <<query>>

What is known so far:
<<notes>>

If this is enough to answer the question, write only: Done
If something is missing, write one short question about the missing thing alone:
Ask: ...""")
ANSWER = Prompt("answer", 1, """Parts of a long document:

<<evidence>>

<<notes>>Question: <<query>>

Answer from these parts alone, in full sentences, without naming the parts. If they do not say, \
write only: Not in the document""")
CLOSED = Prompt("closed", 1, """Question: <<query>>

Answer in one or two sentences from what you know. If nobody can know without the document that \
the question is about, write only: Unknown""")
SAME = Prompt("same", 1, """Question: <<query>>

First answer: <<first>>

Second answer: <<second>>

Do both answers say the same about the question? Write only Yes or No.""")
SUPPORTED = Prompt("supported", 1, """Parts of a document:

<<evidence>>

Question: <<query>>

Answer: <<answer>>

Is everything in the answer said by the parts? Write only Yes or No.""")
ALL = (QUERY, KEYWORDS, READ, STEP, ANSWER, CLOSED, SAME, SUPPORTED)

WISHES = {
    "retrieval": "one question whose answer is a fact in this part: a name, a number, a place, a "
                 "reason or a date.",
    "summary": "one request to sum up what the document says about a topic of this part.",
    "multi_hop": "one question that takes two facts of this part together to answer.",
    "reasoning": "one question that asks why something is so, what follows from it, or how two "
                 "things in this part differ.",
    "coding": "one question about the code in this part: what a function does, what it returns, or "
              "how to change it.",
    "other": "one request that a reader of the document could have, such as to explain, to list, "
             "to compare or to translate something in this part."}
"""What is asked for, by task (the report's types)."""
WEIGHTS = {"retrieval": 30, "summary": 15, "multi_hop": 20, "reasoning": 15, "coding": 15,
           "other": 5}
