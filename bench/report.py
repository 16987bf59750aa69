"""`make report`: the README's tables and plots, rebuilt from the result files.

A table stands between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``; the text around the
markers is left alone. Sections of benchmarks that need a GPU bring their headings along and are
empty as long as there are no result files.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.plots import draw_ttft
from bench.plots_eval import draw_eval, draw_heads
from bench.plots_pipeline import draw_pipeline
from bench.plots_quality import draw_quality
from bench.tables import (
    Content,
    caption,
    decode_section,
    markdown,
    ops_section,
    serve_section,
    ttft_section,
)
from bench.tables_cache import cache_section
from bench.tables_documents import documents_section
from bench.tables_eval import eval_table, fidelity_section, phases_section, scores_section
from bench.tables_pipeline import pipeline_section
from bench.tables_quality import policies_section, quality_section
from bench.tables_train import effects_section, extensions_section, goals_section
from longspan.commands.console import note
from longspan.commands.results import read_bench, read_file
from longspan.errors import LongspanError

PAGES = ("README.md", "docs/documents.md", "docs/evaluation.md", "docs/kv-cache.md",
         "docs/parallelism.md", "docs/sparsity.md", "docs/training.md")
"""Pages with marked places."""
MARKED = re.compile(r"(<!-- bench:(\w+) -->\n)(.*?)(<!-- /bench:\2 -->)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--readme", type=Path, nargs="+", help="pages with the markers",
                        default=[Path(name) for name in PAGES])
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="folder")
    asked = parser.parse_args(arguments)
    try:
        for page in asked.readme:
            run(page, asked.results)
    except LongspanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(readme: Path, results: Path) -> None:
    """Rewrite the marked tables. Raises `LongspanError`: no file, no markers, unknown table."""
    if not readme.is_file():
        raise LongspanError(f"{readme}: no such file; name the file with --readme")
    old = readme.read_text(encoding="utf-8")
    names = [match[2] for match in MARKED.finditer(old)]
    if not names:
        raise LongspanError(f"{readme}: no markers such as <!-- bench:eval --> ... "
                            "<!-- /bench:eval -->; add a pair where the table belongs")
    new = MARKED.sub(lambda match: match[1] + build_table(match[2], results)
                     + draw_images(match[2], results, readme) + match[4], old)
    if new != old:
        readme.write_text(new, encoding="utf-8")
    note(f"{readme}: {', '.join(names)} {'rebuilt' if new != old else 'unchanged'}")


def build_table(name: str, results: Path) -> str:
    """Return one table as markdown, with a line end at its end."""
    known = sorted([*TABLES, *SECTIONS])
    if name not in known:
        raise LongspanError(f"no table is called {name!r}; there are {', '.join(known)}")
    contents = read_bench(results, BENCHES.get(name, name))
    if name in SECTIONS:
        return SECTIONS[name](contents) if contents else ""
    if not contents:
        raise LongspanError(f"{results}: no results of bench {name!r} there; run it first")
    return "\n".join(TABLES[name](content) for content in contents)


def draw_images(name: str, results: Path, readme: Path) -> str:
    """Draw the plots of a table beside the folder of results. Returns the markdown that shows
    them. Raises `LongspanError` without matplotlib."""
    text = ""
    bench = BENCHES.get(name, name)
    for file in sorted(results.glob(f"{bench}.*.json")) if name in PLOTS else ():
        for image in PLOTS[name](read_file(file), results.parent / "plots" / file.stem):
            place = os.path.relpath(image, readme.parent)
            text += f"\n![{image.stem}]({Path(place).as_posix()})\n"
    return text


def cpu_table(content: Content) -> str:
    """Prefill times by implementation and length, and the two ratios."""
    body = [[row["impl"], f"{row['num_tokens']:,}", f"{row['prefill_s']:.1f} s",
             "" if row["density"] is None else f"{100 * row['density']:.1f} %",
             f"{row['peak_memory_gib']:.2f} GiB", str(row["threads"])] for row in content["rows"]]
    table = markdown(["", "tokens", "prefill", "density", "peak memory", "threads"], body)
    summary = content.get("summary")
    if summary:
        table += (
            f"\nSparse is {summary['sparse_over_dense_extrapolated']:.1f} times as fast as dense "
            f"at {summary['demo_length']:,} tokens (dense: {summary['dense_extrapolated_s']:.0f} s,"
            f" extrapolated), and {summary['sparse_over_transformers']:.1f} times as fast as "
            f"transformers at {summary['transformers_length']:,}.\n")
    return caption(content, "prefill, fp32") + table


TABLES: dict[str, Callable[[Content], str]] = {"eval": eval_table, "cpu": cpu_table}
SECTIONS: dict[str, Callable[[Sequence[Content]], str]] = {
    "ttft": ttft_section, "decode": decode_section, "ops": ops_section, "serve": serve_section,
    "pipeline": pipeline_section, "quality": quality_section, "policies": policies_section,
    "scores": scores_section, "fidelity": fidelity_section, "phases": phases_section,
    "goals": goals_section, "effects": effects_section, "extensions": extensions_section,
    "cache": cache_section, "documents": documents_section}
PLOTS: dict[str, Callable[[Content, Path], list[Path]]] = {
    "ttft": draw_ttft, "eval": draw_eval, "fidelity": draw_heads,
    "pipeline": draw_pipeline, "policies": draw_quality}
BENCHES = {"scores": "eval", "phases": "eval", "goals": "eval", "policies": "quality",
           "extensions": "train"}
"""Sections of another bench's files than their name says."""


if __name__ == "__main__":
    sys.exit(main())
