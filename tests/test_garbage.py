"""What is there when a process begins to serve is not looked at again by the garbage collector."""

from __future__ import annotations

import gc
import weakref

from longspan import garbage


class Knot:
    """An object that holds itself, so that only the garbage collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_only_later_garbage_is_looked_for() -> None:
    kept, before = Knot(), weakref.ref(Knot())
    try:
        garbage.freeze()
        assert before() is None, "what was garbage is collected first"
        assert gc.get_freeze_count() > 10_000
        assert not any(each is kept for each in gc.get_objects())
        after = weakref.ref(Knot())
        gc.collect()
        assert after() is None
    finally:
        gc.unfreeze()
