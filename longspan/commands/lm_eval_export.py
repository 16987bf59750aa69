"""Prompts as tasks of lm-eval: a folder for its ``--include_path``.

For each task and length a YAML file and the prompts as JSON lines, and a scorer that asks this
package's tasks, so that answers get the scores that `longspan eval run` gives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longspan.commands.prompts import PromptsJob, gather
from longspan.errors import LongspanError
from longspan.eval.runner import Job, build, work_order
from longspan.eval.task import Answer, Example, Gold, Task, Verdict
from longspan.eval.tasks.registry import TaskOptions, all_tasks

PREFIX = "longspan"
SCORER = """\"\"\"Scores answers as longspan does; the task files beside it name it.\"\"\"

from longspan.commands.lm_eval_export import process_results

__all__ = ["process_results"]
"""


def export(job: PromptsJob, out: Path) -> int:
    """Write the folder. Returns how many prompts it holds.

    Raises `LongspanError` for tasks whose answers are not scored by their text alone, and where the
    folder cannot be written or holds something else.
    """
    _check(job.plan.tasks)
    materials, about = gather(job)
    cells: dict[tuple[str, int], list[str]] = {}
    tasks = {task.name: task for task in job.plan.tasks}
    for work in work_order(job.plan, materials):
        for key, example in zip(work.keys(job.plan.seed), build(job.plan, work, materials),
                                strict=True):
            line = json.dumps(_document(key, work, example), ensure_ascii=False)
            cells.setdefault((work.task.name, work.num_tokens), []).append(line)
    texts = {f"{PREFIX}_scorer.py": SCORER}
    for (name, length), lines in cells.items():
        stem = f"{PREFIX}_{_plain(name)}_{length or 'data'}"
        texts[f"{stem}.jsonl"] = "\n".join(lines) + "\n"
        texts[f"{stem}.yaml"] = _task_file(
            stem, tasks[name], length, (out / f"{stem}.jsonl").resolve(),
            {"seed": job.plan.seed, "haystack": about["haystack"], "n": len(lines)})
    _write(out, texts)
    return sum(map(len, cells.values()))


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one answer: lm-eval's hook. Raises `LongspanError` for a task of another version."""
    task = all_tasks(TaskOptions()).get(doc["task"])
    if task is None:
        raise LongspanError(f"no task is called {doc['task']!r}; the prompts were written by "
                            "another version of longspan")
    gold = Gold(answers=tuple(doc["outputs"]), facts=json.loads(doc["facts"]))
    verdict: Verdict = task.score(gold, Answer(text=results[0]))
    assert verdict.score is not None, "such tasks are not exported"
    return {"score": verdict.score}


def _document(key: str, work: Job, example: Example) -> dict[str, Any]:
    # Facts differ from task to task, and a data set's columns must not: so they are one text.
    return {"key": key, "task": work.task.name, "num_tokens": work.num_tokens or None,
            "input": example.prompt.text, "outputs": list(example.gold.answers),
            "reference": work.task.reference(example.gold),
            "facts": json.dumps(example.gold.facts, ensure_ascii=False),
            "ids_sha256": example.prompt.sha256, "prompt_tokens": len(example.prompt.ids)}


def _task_file(
    name: str, task: Task, length: int, data: Path, about: Mapping[str, Any]
) -> str:
    """Return a task file: every value is JSON, which is YAML, but for the scorer."""
    fields: dict[str, Any] = {
        "task": name, "tag": [PREFIX, f"{PREFIX}_{length or 'data'}"], "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        "output_type": "generate_until", "doc_to_text": "{{input}}",
        "doc_to_target": "{{reference}}", "num_fewshot": 0,
        "generation_kwargs": {"until": [], "max_gen_toks": task.max_tokens, "do_sample": False},
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0, **about}}
    lines = [f"{field}: {json.dumps(value, ensure_ascii=False)}" for field, value in fields.items()]
    return "\n".join([*lines, f"process_results: !function {PREFIX}_scorer.process_results", ""])


def _check(tasks: Sequence[Task]) -> None:
    """Raise `LongspanError` for the first task that no text alone can be scored of."""
    for task in tasks:
        if not task.scores_text or task.name == "longbench-chat":
            raise LongspanError(f"{task.name} is not scored by the text of its answers, so it is "
                                "no task for lm-eval; leave it out")


def _write(out: Path, texts: Mapping[str, str]) -> None:
    """Write the files. Other tasks already there would be run too, so there must be none."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        foreign = sorted(file.name for file in out.iterdir() if file.name not in texts)
        if foreign:
            raise LongspanError(f"{out}: holds {foreign[0]}, which these prompts do not replace; "
                                "name a new folder with --out")
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise LongspanError(f"{out}: cannot be written ({error.strerror}); choose another place "
                            "with --out") from None


def _plain(name: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in name)
