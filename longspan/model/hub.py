"""Checkpoints of the Hugging Face hub: what is downloaded, and how much that would be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from longspan.errors import CheckpointError, MissingDependencyError
from longspan.proxies import check_proxies

TEXTS = ("*.json", "*.jinja", "merges.txt", "tokenizer.model")
WEIGHTS = ("*.safetensors",)
FACTS = ("config.json", "config_1m.json", "sparsity_plan.json")
"""Enough to plan with."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class DownloadSize:
    """What a checkpoint takes to download, bytes."""

    total_bytes: int
    cached_bytes: int
    """What of it is in the hub's cache already."""


def download(name: str, patterns: Sequence[str]) -> Path:
    """Download the files of a repository that fit a pattern, or take them from the cache.

    Raises `CheckpointError` where that fails, `MissingDependencyError` without huggingface_hub.
    """
    _import_hub(name)
    import huggingface_hub as hub

    return Path(_asked(name, lambda: hub.snapshot_download(name, allow_patterns=list(patterns))))


def download_size(name: str) -> DownloadSize | None:
    """Ask the hub for the sizes of the files that loading the model takes; none of them is read.

    None: the hub cannot be asked. Raises as `download` for a repository that is not there.
    """
    _import_hub(name)
    import huggingface_hub as hub
    from huggingface_hub import errors

    def ask() -> DownloadSize | None:
        try:
            found = hub.HfApi().model_info(name, files_metadata=True)
        except errors.HfHubHTTPError:
            raise
        except (_http_error(), errors.OfflineModeIsEnabled):
            return None
        files = [file for file in found.siblings or () if any(
            fnmatchcase(file.rfilename, pattern) for pattern in (*TEXTS, *WEIGHTS))]
        cached = [file for file in files if isinstance(
            hub.try_to_load_from_cache(name, file.rfilename), str)]
        return DownloadSize(*(sum(file.size or 0 for file in some) for some in (files, cached)))

    return _asked(name, ask)


def _import_hub(name: str) -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            f"{name} is a hub id, and huggingface_hub is not installed: pip install huggingface_hub"
        ) from None
    check_proxies()


def _http_error() -> type[Exception]:
    """Return what the hub's HTTP library, which changes with its version, derives all errors from:
    those of connections, which the hub passes on as they are, too."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def _asked(name: str, ask: Callable[[], Result]) -> Result:
    """Turn what the hub's library raises into one line."""
    from huggingface_hub import errors

    try:
        return ask()
    except errors.GatedRepoError:
        reason = "the repository is gated; accept its terms on its page, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "no such repository, or a private one; check the name or run `hf auth login`"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = ("the hub cannot be reached and the files are not in the cache; go online, or "
                  "name a directory")
    except (OSError, ValueError, _http_error()) as error:
        # HTTP errors, broken connections, a full disk, a bad id
        reason = f"download failed ({' '.join(str(error).split())}); try again, or name a directory"
    raise CheckpointError(f"{name}: {reason}")
