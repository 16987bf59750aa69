"""Progressive pre-training of a Qwen2-architecture model over growing context lengths."""

from __future__ import annotations

from longspan.errors import MissingDependencyError

try:
    import transformers  # noqa: F401
except ImportError:
    raise MissingDependencyError(
        "training needs transformers, which is not installed: pip install 'longspan[train]'"
    ) from None
