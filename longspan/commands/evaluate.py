"""Bodies of `longspan eval list | build | run | score | compare | plot | export`."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from longspan.commands import lm_eval_export
from longspan.commands.console import note, percent, seconds, show_table
from longspan.commands.models import (
    ModelJob,
    Setting,
    check_lengths,
    fingerprint,
    open_model,
    settings,
)
from longspan.commands.prompts import PromptsJob, gather, held_out
from longspan.commands.results import make_folder, read_file, write_rows
from longspan.errors import LongspanError
from longspan.eval.compare import compare_runs
from longspan.eval.endpoint import Endpoint, EndpointConfig
from longspan.eval.plot import draw_all
from longspan.eval.plot_fidelity import draw_fidelity
from longspan.eval.prompt import Materials
from longspan.eval.runner import Job, Plan, rescore, work_order
from longspan.eval.runner import build as build_examples
from longspan.eval.runner import run as run_plan
from longspan.eval.samples import MANIFEST, SCHEMA, RunFolder, Sample, open_runs
from longspan.eval.summary import Arm, summarise
from longspan.eval.tasks.longbench_chat import judge_messages, read_rating
from longspan.eval.tasks.registry import SUITES, TaskOptions, all_tasks
from longspan.model.weights import BUNDLED_MODEL

SUMMARY, JUDGED = "summary.json", "judged.json"
FAILED, STOPPED = 1, 3
"""Exit status: some prompts got no answer; the time limit came first."""
MAX_JUDGE_TOKENS = 1024
FORMATS = ("results", "csv", "ruler")
BUILD_FORMATS = ("recipes", "lm-eval")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How long a run may take, and whether its times mean anything."""

    time_limit_s: float | None = None
    """From the command's start, loading included."""
    shares_device: bool = False
    """Other processes compute there too: no times are kept."""
    start_s: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float | None:
        """Seconds until nothing new is begun; None: no end."""
        if self.time_limit_s is None:
            return None
        return max(0.0, self.time_limit_s - (time.monotonic() - self.start_s))


def list_tasks() -> None:
    """Print tasks and suites."""
    tasks = all_tasks(TaskOptions())
    show_table("tasks", ("task", "answer tokens", "group", "lengths", "scores", "suites"), [
        (task.name, task.max_tokens, task.group, "any" if task.is_sized else "of its files",
         "right or wrong" if task.is_binary else "shares",
         ", ".join(name for name, holds in SUITES.items() if holds(task.name)))
        for task in tasks.values()])


def build(job: PromptsJob, out: Path, with_text: bool, form: str) -> None:
    """Write one line for each prompt, or a folder of tasks for lm-eval."""
    if form not in BUILD_FORMATS:
        raise LongspanError(f"--format: {form!r} is not one of {', '.join(BUILD_FORMATS)}")
    if form == "lm-eval":
        note(f"{lm_eval_export.export(job, out):,} prompts in {out}; lm-eval takes them with "
             f"--include_path {out} --tasks {lm_eval_export.PREFIX}")
        return
    materials, _ = gather(job)
    count = 0
    with _writing(out) as file:
        for work in work_order(job.plan, materials):
            examples = build_examples(job.plan, work, materials)
            for key, example in zip(work.keys(job.plan.seed), examples, strict=True):
                recipe = {
                    "key": key, "task": work.task.name, "num_tokens": work.num_tokens or None,
                    "seed": job.plan.seed, "index": work.index, **work.task.options(),
                    "prompt_tokens": len(example.prompt.ids), "ids_sha256": example.prompt.sha256,
                    "positions": example.positions, "outputs": example.gold.answers,
                    "form": example.form,
                    **({"input": example.prompt.text} if with_text else {})}
                file.write(json.dumps(recipe, ensure_ascii=False) + "\n")
                count += 1
    note(f"{count:,} prompts in {out}")


def run(job: PromptsJob, model: ModelJob, out: Path, pace: Pace) -> int:
    """Ask the model in each of its settings, a folder for each. Returns the exit status."""
    if model.endpoint is not None and job.tokenizer == model.model and not _is_there(model.model):
        raise LongspanError(f"{model.model}: no such checkpoint here; name the tokenizer of the "
                            "model behind --url with --tokenizer")
    materials, about = gather(job)
    limit = check_lengths(model, job.plan.lengths)
    materials = replace(materials, max_prompt_tokens=limit)
    longest = _longest(job.plan, materials)
    status = 0
    for setting in settings(model):
        with RunFolder(out / setting.label) as folder:
            manifest = _begin(folder, job, model, setting, materials, about)
            found = _run_setting(job, model, setting, materials, folder, manifest, longest,
                                 pace)
        status = max(status, found)
    return status


def _run_setting(
    job: PromptsJob, model: ModelJob, setting: Setting, materials: Materials, folder: RunFolder,
    manifest: dict[str, Any], longest: int, pace: Pace,
) -> int:
    """Ask what is not answered yet; rebuild the summary whatever happens."""
    done = {key for key, sample in folder.read().items() if sample.status == "ok"}
    left = sum(not done.issuperset(work.keys(job.plan.seed))
               for work in work_order(job.plan, materials))
    status = 0
    try:
        if left and pace.left_s == 0:
            status = STOPPED
        elif left:
            with open_model(model, setting, longest) as (asked, where):
                folder.write_json(MANIFEST, {**manifest, "about": where})
                outcome = run_plan(
                    job.plan, materials, asked, folder, concurrency=model.concurrency,
                    time_limit_s=pace.left_s, is_timed=not pace.shares_device,
                    on_job=lambda work, new: _say(setting, work, new))
            status = STOPPED if outcome.is_stopped else FAILED if outcome.num_failed else 0
        else:
            note(f"{folder.folder}: nothing was left to do")
        if status == STOPPED:
            note("stopped by the time limit; run the same command again to go on")
    finally:
        summary = _summarise(folder)
        if any(row["n"] for row in summary["rows"]):
            show_summary(summary)
    return status


def _begin(
    folder: RunFolder, job: PromptsJob, model: ModelJob, setting: Setting, materials: Materials,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the manifest of a new run, or that of an old one with what is planned now added.

    Raises `LongspanError` when the folder holds samples of something else.
    """
    old = folder.manifest()
    setup = fingerprint(model, setting, about)
    if old and old["setup"] != setup:
        raise LongspanError(f"{folder.folder}: holds samples of another setup (weights, tokenizer, "
                            "texts, template, seed or engine options); choose another --out")
    options = {task.name: task.options() for task in job.plan.tasks}
    for name in options.keys() & old.get("tasks", {}).keys():
        if options[name] != old["tasks"][name]:
            raise LongspanError(f"{folder.folder}: holds samples of {name} with "
                                f"{old['tasks'][name]}, not {options[name]}; choose another --out")
    planned: dict[str, dict[str, int]] = {**old.get("planned", {})}
    for task in job.plan.tasks:
        n = task.num_documents(job.plan.num_samples, materials) * task.num_questions
        lengths = map(str, job.plan.lengths) if task.is_sized else ["data"]
        before = planned.get(task.name, {})
        planned[task.name] = {**before, **{
            length: max(n, before.get(length, 0)) for length in lengths}}
    manifest = {
        "schema": SCHEMA, "model": model.shown_name, "attention": setting.label, "setup": setup,
        "haystack": about["haystack"], "held_out": held_out(job, model.model),
        "prompts": dict(about), "engine": dict(model.options), "tasks": {
            **old.get("tasks", {}), **options}, "planned": planned,
        **({"about": old["about"]} if "about" in old else {})}
    folder.write_json(MANIFEST, manifest)
    return manifest


def score(folders: Sequence[Path], judge: EndpointConfig | None) -> None:
    """Rebuild summaries from stored answers; ask a judge about those that wait for one."""
    for folder in open_runs(folders):
        if judge is not None:
            with Endpoint(judge) as endpoint:
                _judge(folder, endpoint)
        show_summary(_summarise(folder))


def compare(first: Path, second: Path, margin: float, out: Path | None) -> None:
    """Print the paired comparison of two runs."""
    runs = open_runs([first, second])
    tasks = all_tasks(TaskOptions())
    rows = compare_runs(_samples(runs[0]), _samples(runs[1]), tasks, margin)
    show_table(f"{second} against {first}", (
        "task", "tokens", "n", "first", "second", "difference", "95 % interval", "better",
        "worse", "p", f"margin {100 * margin:g}", "nats a token"), [
        (row["task"], _tokens(row), row["n"], percent(row["first"]), percent(row["second"]),
         f"{100 * row['difference']:+.1f}", _interval(row), row["num_better"], row["num_worse"],
         "" if row["p_value"] is None else f"{row['p_value']:.3g}", row["verdict"],
         _nats(row, "nll_difference", "nll_ci_low", "nll_ci_high", sign="+"))
        for row in rows])
    if out is not None:
        _write_csv(out, rows)


def plot(folders: Sequence[Path], out: Path) -> None:
    """Draw all plots of the runs; of files that `fidelity` wrote, theirs."""
    files = [place for place in folders if place.is_file()]
    for file in files:
        content = read_file(file)
        if content.get("bench") != "fidelity":
            raise LongspanError(f"{file}: only files that longspan eval fidelity wrote are drawn; "
                                "of runs name the folders")
        for drawn in draw_fidelity(content["rows"], out):
            note(str(drawn))
    runs = [place for place in folders if not place.is_file()]
    for drawn in draw_all([_summarise(folder) for folder in open_runs(runs)], out) if runs else ():
        note(str(drawn))


def export(folders: Sequence[Path], form: str, out: Path) -> None:
    """Write rows, a table, or predictions."""
    if form not in FORMATS:
        raise LongspanError(f"--format: {form!r} is not one of {', '.join(FORMATS)}")
    for folder in open_runs(folders):
        manifest = folder.manifest()
        rows = _summarise(folder)["rows"]
        name = f"{manifest['model']}.{manifest['attention']}"
        if form == "results":
            if "about" not in manifest:
                raise LongspanError(f"{folder.folder}: nothing was run there yet")
            note(str(write_rows(out, "eval", [row for row in rows if row["n"]],
                                about=manifest["about"])))
        elif form == "csv":
            _write_csv(out / f"{name}.csv", rows)
        else:
            _write_predictions(out / name, _samples(folder))


def show_summary(summary: Mapping[str, Any]) -> None:
    """Scores over all depths, and areas under curves, as tables on stdout."""
    rows = [row for row in summary["rows"] if row["depth"] is None]
    title = f"{rows[0]['model']}, {rows[0]['attention']}" if rows else "no rows"
    columns = ("task", "tokens", "score", "95 % interval", "n", "answer, nats a token", "density",
               "first token", "form", "status")
    cells = [(row["task"], _tokens(row), _score(row), _interval(row), row["n"],
              _nats(row, "answer_nll", "answer_nll_low", "answer_nll_high"),
              percent(row.get("density")), seconds(row.get("ttft_s")), row.get("form", ""),
              row["status"]) for row in rows]
    used = [place for place in range(len(columns))
            if any(cell[place] not in ("", "-") for cell in cells)]
    show_table(title, [columns[place] for place in used],
               [[cell[place] for place in used] for cell in cells])
    if summary["areas"]:
        show_table("area under the score-length curve", (
            "task", "from", "to", "area", "95 % interval", "n", "status"), [
            (row["task"], f"{row['first_len']:,}", f"{row['last_len']:,}", _score(row),
             _interval(row), row["n"], row["status"]) for row in summary["areas"]])


def _summarise(folder: RunFolder) -> dict[str, Any]:
    """Rebuild the summary of a run and write it beside its samples."""
    manifest = folder.manifest()
    tasks = all_tasks(TaskOptions())
    arm = Arm(manifest["model"], manifest["attention"], {
        "haystack": manifest["haystack"], "held_out": manifest["held_out"]})
    planned = {name: cells for name, cells in manifest["planned"].items() if name in tasks}
    summary = summarise(arm, planned, _samples(folder).values(), tasks)
    folder.write_json(SUMMARY, summary)
    return summary


def _samples(folder: RunFolder) -> dict[str, Sample]:
    """Read the samples, with today's verdicts and those of judges."""
    samples = rescore(folder.read(), all_tasks(TaskOptions()))
    judged = _judged(folder)
    return {key: replace(sample, score=judged[key]["score"], label="") if key in judged else sample
            for key, sample in samples.items()}


def _judged(folder: RunFolder) -> dict[str, Any]:
    file = folder.folder / JUDGED
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found


def _judge(folder: RunFolder, judge: Endpoint) -> None:
    """Ask about every answer without a verdict; each verdict is written at once."""
    judged = _judged(folder)
    waiting = {key: sample for key, sample in _samples(folder).items()
               if sample.status == "ok" and sample.score is None}
    for key, sample in waiting.items():
        reply = judge.say(judge_messages(sample.gold, sample.text), MAX_JUDGE_TOKENS)
        rating = read_rating(reply)
        if rating is None:
            note(f"{key}: the judge gave no rating: {reply[:80]!r}")
            continue
        judged[key] = {"score": rating, "reply": reply}
        folder.write_json(JUDGED, judged)


def _longest(plan: Plan, materials: Materials) -> int:
    """Tokens of the longest prompt and answer: of the lengths asked for and of data."""
    sized = [length for length in plan.lengths if any(task.is_sized for task in plan.tasks)]
    data = [len(example.prompt.ids) + work.task.max_tokens
            for work in work_order(plan, materials) if not work.num_tokens
            for example in build_examples(plan, work, materials)]
    return max([*sized, *data])


def _is_there(checkpoint: str) -> bool:
    return checkpoint == BUNDLED_MODEL or Path(checkpoint).is_dir()


def _say(setting: Setting, work: Job, new: Sequence[Sample]) -> None:
    scores = [sample.score for sample in new if sample.score is not None]
    shown = f"{sum(scores):g}/{len(scores)}" if scores else new[0].status
    why = f": {new[0].error}" if new[0].error else ""
    took = "" if new[0].ttft_s is None else f", first token after {seconds(new[0].ttft_s)}"
    note(f"{setting.label:<16} {work.task.name:<16} {work.num_tokens or new[0].prompt_tokens:>9,} "
         f"tokens  #{work.index}  {shown}{took}{why}")


def _score(row: Mapping[str, Any]) -> str:
    if row["score"] is None:
        return "-"
    return percent(row["score"]) if row["score"] <= 1 else f"{row['score']:.3f}"


def _interval(row: Mapping[str, Any]) -> str:
    if row["ci_low"] is None:
        return "-"
    return f"{100 * row['ci_low']:.1f} to {100 * row['ci_high']:.1f}"


def _nats(row: Mapping[str, Any], mean: str, low: str, high: str, sign: str = "") -> str:
    if row.get(mean) is None:
        return ""
    text = f"{row[mean]:{sign}.2f}"
    return text if row[low] is None else f"{text} ({row[low]:{sign}.2f} to {row[high]:{sign}.2f})"


def _tokens(row: Mapping[str, Any]) -> str:
    return "data" if row["num_tokens"] is None else f"{row['num_tokens']:,}"


def _write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with _writing(file) as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(rows)
    note(str(file))


def _write_predictions(folder: Path, samples: Mapping[str, Sample]) -> None:
    """Write a file for each task and length, as NVIDIA's evaluate.py reads them."""
    cells: dict[tuple[str, int | None], list[Sample]] = {}
    for sample in samples.values():
        if sample.status == "ok":
            cells.setdefault((sample.task, sample.num_tokens), []).append(sample)
    for (task, length), found in cells.items():
        file = folder / str(length or "data") / f"{task}.jsonl"
        with _writing(file) as out:
            for sample in found:
                line = {"index": sample.index, "outputs": sample.answers, "pred": sample.text}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
        note(str(file))


@contextmanager
def _writing(file: Path) -> Iterator[TextIO]:
    """Open a file to write text to. Raises `LongspanError` where there can be none, or no more of
    it."""
    make_folder(file.parent)
    try:
        with file.open("w", encoding="utf-8", newline="") as out:
            yield out
    except OSError as error:
        raise LongspanError(f"{file}: cannot be written ({error.strerror}); choose another place "
                            "with --out") from None


