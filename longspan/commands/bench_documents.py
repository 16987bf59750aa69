"""`longspan bench documents` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspan.commands.options import Attention, Commit, Device, Model, Results, Threads, parse_list
from longspan.commands.run_app import end_with

bench_documents_app = typer.Typer(rich_markup_mode=None)


@bench_documents_app.command("documents")
def bench_documents(
    model: Model,
    what: Annotated[str, typer.Option(help="folder, pdf, or both.")] = "folder,pdf",
    files: Annotated[int, typer.Option(help="Files of the folder, 1 to 40.")] = 40,
    pages: Annotated[int, typer.Option(help="Pages of the PDF, 1 to 40.")] = 40,
    num_questions: Annotated[int, typer.Option(
        "-n", min=1, help="Questions about the folder, and as many about the PDF.")] = 40,
    seed: Annotated[int, typer.Option(help="Same seed, same documents.")] = 0,
    attention: Attention = "auto", threads: Threads = None, device: Device = None,
    commit: Commit = None, out: Results = Path("bench/results"),
) -> None:
    """Ask about a folder of files and about a PDF: answers, and the places named for them."""
    from longspan.bench.documents.answers import DocumentsOptions, run
    from longspan.bench.session import BenchOptions, BenchSession

    session = BenchSession("documents", BenchOptions.make(device, out, commit, None))
    options = DocumentsOptions(
        model=model, what=parse_list(what, str, "--what"), num_files=files, num_pages=pages,
        num_questions=num_questions, seed=seed, attention=attention,
        device=session.device, threads=threads)
    end_with(run(session, options))
