"""Progressive pre-training of a Qwen2-architecture model over growing context lengths."""

from __future__ import annotations

from longspan.errors import MissingDependencyError

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise  # it is there, and lacks something itself
    raise MissingDependencyError(
        "training needs transformers, which is not installed: pip install 'longspan[train]'"
    ) from None
