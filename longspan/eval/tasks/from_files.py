"""Prompts whose text comes from a data file, as one piece."""

from __future__ import annotations

from dataclasses import replace

from longspan.errors import LongspanError
from longspan.eval.prompt import Frame, Materials, Prompt, open_prompt
from longspan.eval.task import Task


def whole_prompt(
    materials: Materials, message: str, task: Task, frame: Frame | None = None
) -> Prompt:
    """Build the prompt of a message, in the given frame or that of the materials.

    Raises `LongspanError` if it and the longest answer do not fit the model.
    """
    if frame is not None:
        materials = replace(materials, frame=replace(frame, prefix_in=materials.frame.prefix_in))
    prompt = Prompt(open_prompt(materials, message + materials.frame.after), materials.frame)
    limit = materials.max_prompt_tokens
    if limit is not None and len(prompt.ids) + task.max_tokens > limit:
        raise LongspanError(
            f"{task.name}: a prompt of {len(prompt.ids):,} tokens and {task.max_tokens} of answer "
            f"are more than the model's {limit:,}; leave the task out, or raise --max-model-len")
    return prompt
