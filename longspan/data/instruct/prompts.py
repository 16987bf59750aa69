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
        assert all(f"<<{name}>>" in text for name in values), self.label
        pieces = text.split("<<")
        filled = [pieces[0]]
        for piece in pieces[1:]:
            name, _, rest = piece.partition(">>")
            filled += [str(values[name]), rest]
        return "".join(filled)


QUERY = Prompt("query", 2, """Read this part of a long document:

<part>
<<segment>>
</part>

A reader has the whole document. Write <<wish>> Use the names of the people, places, things or \
functions that it is about. Do not answer it. Write one line.""")
KEYWORDS = Prompt("keywords", 1, """Question about a long document: <<query>>

Write up to eight words to search the document for, in the language of the document, on one line, \
with commas between. Write nothing else.""")
READ = Prompt("read", 2, """Question: <<query>>

Part <<number>> of <<count>> of a document:

<part>
<<chunk>>
</part>

Which sentences of this part help to answer the question "<<query>>"? Copy them word by word, one \
a line, at most three. If none of them helps, write only: None""")
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
    "retrieval": "one question with a short answer, such as a name, a number, a place or a date, "
                 "which this part tells.",
    "summary": "one request to summarize what the document says about a topic of this part.",
    "multi_hop": "one question that takes two different sentences of this part to answer.",
    "reasoning": "one question about why something that this part tells is so, or what followed "
                 "from it.",
    "coding": "one question about a function or class of this part: what it does, what it returns, "
              "or how it is used.",
    "other": "one request to explain, to list or to compare things that this part tells of."}
"""What is asked for, by task (the report's types)."""
_BRIDGE = ("The bridge at Orsk was opened in 1931. Its engineer, Pavel Morin, had lost his brother "
           "in the ferry that sank there, and asked for no pay. Until 1950 carts paid two coins, "
           "walkers one.")
_CODE = ("def clamp(value, low, high):\n    if low > high:\n        raise ValueError(low)\n"
         "    return min(max(value, low), high)")
EXAMPLES = {
    "retrieval": (_BRIDGE, "In which year was the bridge at Orsk opened?"),
    "summary": (_BRIDGE, "Summarize what the document says about the bridge at Orsk."),
    "multi_hop": (_BRIDGE, "How much did a walker pay in 1940 to cross the bridge that Pavel Morin "
                           "built?"),
    "reasoning": (_BRIDGE, "Why did Pavel Morin ask for no pay for the bridge at Orsk?"),
    "coding": (_CODE, "What does clamp do when low is greater than high?"),
    "other": (_BRIDGE, "Compare what carts and walkers paid on the bridge at Orsk.")}
"""A segment and a query of each task, shown as an earlier turn: small models do as was done, where
they answer a question that they were told to ask."""
WEIGHTS = {"retrieval": 30, "summary": 15, "multi_hop": 20, "reasoning": 15, "coding": 15,
           "other": 5}
