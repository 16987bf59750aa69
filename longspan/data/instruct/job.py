"""One sample: a query about a random segment, the answer over the whole document, the filters."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longspan.data.instruct.agent import Agent, Found, OpenDocument, read, retrieve
from longspan.data.instruct.asking import Asker
from longspan.data.instruct.checks import (
    AGREE,
    DISAGREE,
    Verdict,
    agreement,
    check_grounded,
    check_length,
    check_query,
    check_refusal,
    is_refusal,
)
from longspan.data.instruct.library import Library, Text, split
from longspan.data.instruct.prompts import (
    ANSWER,
    CLOSED,
    EXAMPLES,
    QUERY,
    SAME,
    SUPPORTED,
    WISHES,
    Prompt,
)
from longspan.data.tokens import TokenTable

_MARK = re.compile(r"^\W*(?:question|request|query)\W*:\s*", re.IGNORECASE)
_YES = re.compile(r"\W*yes\b", re.IGNORECASE)
CODE = (".py", ".c", ".h", ".cc", ".cpp", ".cu", ".go", ".rs", ".js", ".ts", ".java", ".rb", ".sh",
        ".php", ".swift", ".kt", ".scala", ".lua", ".jl", ".r", ".sql", ".hs", ".ml")
"""How names of documents end that are code."""
FORMS = ("{document}\n\n{query}", "{document}\n\n{query}", "{document}\n\n{query}",
         "{query}\n\n{document}", "Document:\n\n{document}\n\nTask: {query}",
         "<document>\n{document}\n</document>\n\n{query}")
"""How a user puts a document and a query together."""
_TEMPERATURE = 0.8
_QUERY_LEN = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How samples are made."""

    agent: Agent
    seed: int
    weights: Mapping[str, float]
    segment_len: int = 1024
    """Tokens of the segment that a query is written from, at most."""
    max_tokens: int = 250_000
    """Tokens of the document, at most; of a longer one a span is taken."""
    has_judge: bool = True
    """Whether the model judges what rules cannot."""


@dataclass(slots=True)
class Draft:
    """A sample while it is made."""

    text: Text
    task: str
    segment: tuple[int, int]
    """Tokens [start, stop) of the text."""
    query: str = ""
    segment_answer: str = ""
    found: Found | None = None
    verdicts: list[Verdict] = field(default_factory=list)

    def passes(self, verdict: Verdict) -> bool:
        """Note a verdict; whether the sample is still in."""
        self.verdicts.append(verdict)
        return verdict.passed


def make_sample(library: Library, recipe: Recipe, asker: Asker, index: int) -> dict[str, Any]:
    """Return a line for the samples or, where a filter says no, for those that were rejected."""
    rng = random.Random(repr((recipe.seed, asker.job)))
    text = library.text(rng, index, recipe.max_tokens)
    segments = split(text.ids, library.table, recipe.segment_len)
    draft = Draft(text, _draw_task(rng, recipe.weights, text.name), rng.choice(segments))
    form = rng.choice(FORMS)
    _fill(draft, library.table, recipe, asker)
    line = {"task": draft.task, "provenance": _provenance(draft, asker)}
    failed = [verdict.name for verdict in draft.verdicts if not verdict.passed]
    if failed:
        assert len(failed) == 1, "the first filter that says no is the last one"
        answer = draft.found.text if draft.found else ""
        return {"rejected": failed[0], "answer": answer, **line}
    assert draft.found is not None
    content = form.replace("{query}", draft.query).replace(
        "{document}", library.table.text(text.ids).strip())
    return {"messages": [{"role": "user", "content": content},
                         {"role": "assistant", "content": draft.found.text}], **line}


def _draw_task(rng: random.Random, weights: Mapping[str, float], name: str) -> str:
    """Return a task; only documents of code are asked about code."""
    allowed = [task for task in weights if task != "coding" or name.lower().endswith(CODE)]
    allowed = allowed or list(weights)
    return rng.choices(allowed, [weights[task] for task in allowed])[0]


def _fill(draft: Draft, table: TokenTable, recipe: Recipe, asker: Asker) -> None:
    """Ask and answer, filter by filter, until one says no."""
    start, stop = draft.segment
    segment = table.text(draft.text.ids[start:stop]).strip()
    wish, (shown, asked) = WISHES[draft.task], EXAMPLES[draft.task]
    example = (QUERY.fill({"segment": shown, "wish": wish}), asked)
    reply = asker.ask(QUERY, _QUERY_LEN, _TEMPERATURE, example, wish=wish, segment=segment)
    draft.query = _first_line(reply.text)
    if not draft.passes(check_query(draft.query, reply.is_cut)):
        return
    # The second way to the answer: from where the query comes from.
    draft.segment_answer = asker.ask(ANSWER, recipe.agent.answer_len, query=draft.query, notes="",
                                     evidence=f"<part>\n{segment}\n</part>").text
    if not draft.passes(Verdict("answerable", not is_refusal(draft.segment_answer))):
        return
    if not draft.passes(_check_closed(draft, recipe, asker)):
        return
    document = OpenDocument(draft.text.ids, table, recipe.agent)
    draft.found = read(asker, document, draft.query)
    evidence = document.show(draft.found.evidence)
    answer = draft.found.text
    for verdict in (check_refusal(answer), check_length(answer, draft.found.is_cut),
                    check_grounded(answer, draft.query, evidence)):
        if not draft.passes(verdict):
            return
    if recipe.has_judge and not draft.passes(Verdict("supported", _says_yes(
            asker, SUPPORTED, evidence=evidence, query=draft.query, answer=answer))):
        return
    draft.passes(_check_agreement(draft, document, recipe, asker))


def _first_line(reply: str) -> str:
    """Return the query of a reply: models add answers and marks."""
    lines = [line for line in _MARK.sub("", reply).split("\n") if line.strip()]
    return " ".join(lines[0].split()).strip("\"*") if lines else ""


def _check_closed(draft: Draft, recipe: Recipe, asker: Asker) -> Verdict:
    """Whether the document is needed: what is said without it must not be the answer."""
    reply = asker.ask(CLOSED, 128, query=draft.query).text
    # A question that has its answer in it needs no document either.
    value = max(agreement(draft.segment_answer, reply),
                float(_is_within(draft.segment_answer, draft.query)))
    if DISAGREE < value < AGREE and recipe.has_judge:
        value = float(_says_yes(asker, SAME, query=draft.query, first=draft.segment_answer,
                                second=reply))
    return Verdict("needs the document", value < AGREE, round(value, 3))


def _is_within(answer: str, query: str) -> bool:
    return len(answer) > 2 and answer.strip(" .").lower() in query.lower()


def _check_agreement(
    draft: Draft, document: OpenDocument, recipe: Recipe, asker: Asker
) -> Verdict:
    """Whether another way comes to the same: the segment's own answer, or retrieval alone."""
    assert draft.found is not None
    best = 0.0
    for way in ("segment", "retrieval"):
        other = (draft.segment_answer if way == "segment"
                 else retrieve(asker, document, draft.query).text)
        value = agreement(draft.found.text, other)
        if DISAGREE < value < AGREE and recipe.has_judge:
            value = float(_says_yes(asker, SAME, query=draft.query, first=draft.found.text,
                                    second=other))
        best = max(best, value)
        if best >= AGREE:
            return Verdict("agreement", True, way)
    return Verdict("agreement", False, round(best, 3))


def _says_yes(asker: Asker, prompt: Prompt, **values: object) -> bool:
    return _YES.match(asker.ask(prompt, 8, **values).text) is not None


def _provenance(draft: Draft, asker: Asker) -> dict[str, Any]:
    text, found = draft.text, draft.found
    first, last = (text.start + place for place in draft.segment)
    return {
        "job": asker.job, "query": draft.query, "document": text.name, "is_whole": text.is_whole,
        "tokens": [text.start, text.start + len(text.ids)], "segment": [first, last],
        "segment_answer": draft.segment_answer, "steps": asker.steps,
        "evidence": list(found.evidence) if found else [],
        "sub_questions": [list(step) for step in found.steps] if found else [],
        "num_quotes": len(found.quotes) if found else 0,
        "verdicts": [verdict.as_json() for verdict in draft.verdicts]}
