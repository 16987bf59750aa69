"""`longspan cache`: what a directory of KV files holds; it is deleted, or checked byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

cache_app = typer.Typer(help="Look after a directory of KV files (--kv-dir).",
                        rich_markup_mode=None)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The --kv-dir of a server.")]
Key = Annotated[str | None, typer.Option(help="Only one engine's files: the start of its key.")]


@cache_app.command("list")
def list_files(folder: Folder) -> None:
    """Show each engine's files, tokens, room and last use."""
    from longspan.commands.cache_files import show

    show(folder)


@cache_app.command()
def drop(folder: Folder, key: Key = None) -> None:
    """Delete KV files; those of other kinds are left alone. Not while an engine uses them."""
    from longspan.commands.cache_files import drop

    drop(folder, key)


@cache_app.command()
def verify(folder: Folder) -> None:
    """Read every file and compare its checksums; status 1 if something is damaged."""
    from longspan.commands.cache_files import verify

    if not verify(folder):
        raise typer.Exit(1)
