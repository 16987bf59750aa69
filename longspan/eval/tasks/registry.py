"""The names of all tasks, and of groups of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longspan.errors import LongspanError
from longspan.eval.task import Task
from longspan.eval.tasks import longbench, lveval
from longspan.eval.tasks.longbench_chat import LongBenchChatTask
from longspan.eval.tasks.needles import (
    PLACES,
    AbsentTask,
    GridTask,
    HardNegativesTask,
    OrdinalTask,
    QuestionsTask,
)
from longspan.eval.tasks.niah import NiahTask
from longspan.eval.tasks.passkey import PasskeyTask
from longspan.eval.tasks.perplexity import PerplexityTask
from longspan.eval.tasks.ruler_qa import DocumentTask
from longspan.eval.tasks.variables import VariableTask
from longspan.eval.tasks.wordings import FRESH, WordingsTask
from longspan.eval.tasks.words import CommonWordsTask, FrequentWordsTask

NIAH_TASKS = (
    NiahTask(name="niah_single_1", haystack="noise"),
    NiahTask(name="niah_single_2"),
    NiahTask(name="niah_single_3", value_type="uuids"),
    NiahTask(name="niah_multikey_1", num_keys=4),
    NiahTask(name="niah_multikey_2", haystack="needles"),
    NiahTask(name="niah_multikey_3", haystack="needles", key_type="uuids", value_type="uuids"),
    NiahTask(name="niah_multivalue", num_values=4),
    NiahTask(name="niah_multiquery", num_queries=4),
)
RETRIEVAL = tuple(task.name for task in NIAH_TASKS)
TRACKING, COUNTING = ("vt",), ("cwe", "fwe")
RULER_11 = (*RETRIEVAL, *TRACKING, *COUNTING)
MACROS: dict[str, tuple[str, ...]] = {
    "ruler-retrieval": RETRIEVAL, "ruler-tracking": TRACKING, "ruler-counting": COUNTING,
    "ruler-11": RULER_11, "ruler-13": (*RULER_11, "qa_1", "qa_2"),
}
"""Means of task means, by name. ``ruler-13`` alone is what others call RULER's average."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskOptions:
    """What can be chosen about tasks."""

    num_depths: int = 11
    """Rows of the needle grid."""
    num_questions: int = 20
    """Passkey questions about one document."""
    num_distractors: int = 5
    """Further passkeys in it."""

    def __post_init__(self) -> None:
        if min(self.num_depths, self.num_questions) < 1 or self.num_distractors < 0:
            raise LongspanError(
                f"{self.num_depths} depths, {self.num_questions} questions and "
                f"{self.num_distractors} distractors: depths and questions must be positive, "
                "distractors must not be negative")


def all_tasks(options: TaskOptions) -> dict[str, Task]:
    """Return every task by its name."""
    tasks: list[Task] = [
        PasskeyTask(num_questions=options.num_questions, num_distractors=options.num_distractors),
        GridTask(num_depths=options.num_depths),
        *NIAH_TASKS, VariableTask(), VariableTask(name="vt_no_space", keeps_space=False),
        CommonWordsTask(), FrequentWordsTask(),
        DocumentTask(name="qa_1", dataset="squad"), DocumentTask(name="qa_2", dataset="hotpotqa"),
        *(QuestionsTask(name=f"questions_{place}", place=place) for place in PLACES),
        HardNegativesTask(), OrdinalTask(), AbsentTask(), WordingsTask(),
        WordingsTask(name="fresh_wordings", wordings=FRESH), PerplexityTask(),
        *(lveval.LvEvalTask.of(dataset, level) for dataset in lveval.PROMPTS
          for level in lveval.LEVELS),
        *(longbench.LongBenchTask.of(dataset) for dataset in longbench.PROMPTS),
        LongBenchChatTask(),
    ]
    return {task.name: task for task in tasks}


SUITES: dict[str, Callable[[str], bool]] = {
    # The other form of variable tracking is asked beside the published one.
    "ruler-11": lambda name: name in (*RULER_11, "vt_no_space"),
    "ruler-13": lambda name: name in (*MACROS["ruler-13"], "vt_no_space"),
    "needles": lambda name: name in ("hard_negatives", "ordinal", "absent", "unseen_wordings",
                                     "fresh_wordings", *(f"questions_{place}" for place in PLACES)),
    "lveval": lambda name: name.startswith(lveval.PREFIX),
    "longbench": lambda name: name.startswith(longbench.PREFIX),
}
"""Names that stand for several tasks."""


def make_tasks(names: Sequence[str], options: TaskOptions) -> tuple[Task, ...]:
    """Make the tasks and those of the suites with these names, each once.

    Raises `LongspanError` for an unknown name.
    """
    known = all_tasks(options)
    chosen: dict[str, Task] = {}
    for name in names:
        found = [task for task in known if name == task or name in SUITES and SUITES[name](task)]
        if not found:
            near = difflib.get_close_matches(name, [*known, *SUITES], 3)
            hint = f"did you mean {', '.join(near)}?" if near else "see longspan eval list"
            raise LongspanError(f"no task is called {name!r}; {hint}")
        chosen.update((task, known[task]) for task in found)
    return tuple(chosen.values())
