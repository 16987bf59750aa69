"""Log-probabilities of one prompt's tokens, put together from what steps send. No torch."""

from __future__ import annotations

import numpy as np

from longspan.engine import step
from longspan.engine.request import PromptLogprobs


class PromptScores:
    """Fills up while the prompt is computed.

    Args:
        num_top: alternatives for each token, K.
    """

    def __init__(self, prompt_len: int, num_top: int) -> None:
        shape = prompt_len, num_top
        self.found = PromptLogprobs(
            np.full(prompt_len, np.nan, np.float32), np.full(shape, -1, np.int32),
            np.full(shape, np.nan, np.float32))
        self.is_broken = False
        """Some came that are no numbers."""

    def take(self, part: step.PromptLogprobs) -> None:
        """Note those of some consecutive tokens."""
        logprobs = np.frombuffer(part.logprobs, np.float32)
        self.is_broken |= bool(np.isnan(logprobs).any())
        rows = slice(part.first, part.first + len(logprobs))
        shape = len(logprobs), self.found.top_ids.shape[1]
        self.found.logprobs[rows] = logprobs
        self.found.top_ids[rows] = np.frombuffer(part.top_ids, np.int32).reshape(shape)
        self.found.top_logprobs[rows] = np.frombuffer(part.top_logprobs, np.float32).reshape(shape)
