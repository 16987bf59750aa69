"""What `longspan eval` builds prompts of: tasks, texts, words, template."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longspan.engine.text.tokenizer import Tokenizer
from longspan.errors import LongspanError
from longspan.eval.prompt import PLAIN, PREFIX_PLACES, Frame, Materials
from longspan.eval.runner import Plan
from longspan.eval.tasks.registry import TaskOptions, make_tasks
from longspan.eval.text import Encoder, TextBank, held_out_roots, python_text_roots
from longspan.model.weights import BUNDLED_MODEL, resolve_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptsJob:
    """Which prompts are built, and of what."""

    tokenizer: str
    """Checkpoint."""
    plan: Plan
    text_roots: tuple[Path, ...]
    """Empty: the default texts."""
    words: Path | None
    data: Path | None
    template: str
    prefix: str

    def __post_init__(self) -> None:
        if self.template not in ("chat", "none"):
            raise LongspanError(f"--template: {self.template!r} is not one of chat, none")
        if self.prefix not in PREFIX_PLACES:
            raise LongspanError(
                f"--prefix: {self.prefix!r} is not one of {', '.join(PREFIX_PLACES)}")


def make_plan(
    tasks: Sequence[str], lengths: Sequence[int], num_samples: int, seed: int, options: TaskOptions
) -> Plan:
    """Make the plan for tasks and suites, each text a name or several with commas between.

    Raises `LongspanError` for names that there are not.
    """
    names = [name.strip() for text in tasks for name in text.split(",")]
    return Plan(tasks=make_tasks(names, options), lengths=tuple(lengths), num_samples=num_samples,
                seed=seed)


def gather(job: PromptsJob) -> tuple[Materials, dict[str, Any]]:
    """Gather what prompts are built of, and what the manifest says about it."""
    path = resolve_checkpoint(job.tokenizer)
    tokenizer = Tokenizer(path)
    roots = list(job.text_roots or held_out_roots())
    bank = TextBank.from_roots(roots, tokenizer)
    frame = Frame.chat(tokenizer, job.prefix) if job.template == "chat" else replace(
        PLAIN, prefix_in=job.prefix)
    words = _read_words(job.words)
    names = "installed packages" if not job.text_roots else ", ".join(
        root.name or str(root) for root in roots)
    about = {
        "tokenizer": hashlib.sha256(tokenizer.to_json().encode()).hexdigest()[:16],
        "haystack": names, "texts": bank.fingerprint, "template": job.template,
        "frame": [frame.before, frame.after], "prefix_in": frame.prefix_in,
        "words": hashlib.sha256("\n".join(words).encode()).hexdigest()[:16] if words else None,
        "seed": job.plan.seed}
    return Materials(encoder=Encoder(tokenizer), bank=bank, frame=frame, words=words,
                     data=job.data), about


def held_out(job: PromptsJob, model: str) -> bool | None:
    """Whether the model was trained without the haystacks; None: nobody knows."""
    if BUNDLED_MODEL not in (model, job.tokenizer):
        return None
    if not job.text_roots:
        return True
    known = [root.resolve() for root in python_text_roots()]
    inside = [any(root.resolve().is_relative_to(place) for place in known)
              for root in job.text_roots]
    return False if any(inside) else None


def _read_words(file: Path | None) -> tuple[str, ...]:
    if file is None:
        return ()
    try:
        words = tuple(dict.fromkeys(file.read_text(encoding="utf-8").split()))
    except (OSError, UnicodeDecodeError) as error:
        raise LongspanError(f"{file}: no file of words ({error})") from None
    if not words:
        raise LongspanError(f"{file}: holds no words")
    return words
