"""Processes that torchrun has started: rank 0 runs the command, the others compute with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from longspan.config import EngineConfig
from longspan.rank_place import RankPlace


def join_ranks(
    model: str, options: Mapping[str, Any], variables: Mapping[str, str],
) -> dict[str, Any]:
    """Return rank 0's options of the engine. Other ranks do not return: they compute until rank 0
    ends, and end with their own status.

    Args:
        options: fields of `EngineConfig`.
        variables: of the environment.

    Raises `LongspanError` where torchrun's variables and the options disagree.
    """
    place = RankPlace.find(variables)
    if place is None:
        return dict(options)
    joined = {**options, **place.sharing(options), "place": place}
    if place.rank == 0:
        return joined
    from longspan.engine.setup.follow import follow_torchrun

    status = follow_torchrun(EngineConfig(model=model, **joined), place)
    sys.stderr.flush()
    os._exit(status)  # threads may be waiting, and nothing is left to tidy up
