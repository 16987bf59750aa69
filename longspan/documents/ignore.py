"""Which files a folder's `.gitignore` files leave out, as git does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pathspec import GitIgnoreSpec

NAME = ".gitignore"
OF_REPOSITORY = Path(".git", "info", "exclude")


@dataclass(frozen=True, slots=True)
class IgnoreRules:
    """The rules that hold in one folder, those of the outermost folder first."""

    layers: tuple[tuple[Path, GitIgnoreSpec], ...] = ()

    @classmethod
    def above(cls, folder: Path) -> Self:
        """Read the rules of the repository that a folder lies in; none outside a repository.

        A folder that these rules ignore is read all the same, for somebody named it: they then
        hold for nothing in it.
        """
        parents = list(folder.parents)
        root = next((i for i, parent in enumerate(parents) if (parent / ".git").exists()), None)
        if root is None or (folder / ".git").exists():
            return cls()
        rules = cls()
        for parent in reversed(parents[: root + 1]):
            if rules.ignores(parent, is_folder=True):
                return cls()
            rules = rules.inside(parent)
        return cls() if rules.ignores(folder, is_folder=True) else rules

    def inside(self, folder: Path) -> Self:
        """Return the rules in a folder: these, then the folder's own."""
        found = [spec for name in (OF_REPOSITORY, Path(NAME))
                 if (spec := _read(folder / name)) is not None]
        return type(self)((*self.layers, *((folder, spec) for spec in found)))

    def ignores(self, path: Path, *, is_folder: bool) -> bool:
        """Whether a file or folder is left out; the innermost rule that speaks of it decides."""
        for folder, spec in reversed(self.layers):
            name = path.relative_to(folder).as_posix() + ("/" if is_folder else "")
            verdict = spec.check_file(name).include
            if verdict is not None:
                return bool(verdict)
        return False


def _read(file: Path) -> GitIgnoreSpec | None:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return GitIgnoreSpec.from_lines(lines)
