from __future__ import annotations

import gc
import weakref
from typing import Any

from retrieval_draft.server.run import set_aside


class _Node:
    itself: Any = None


def test_what_was_loaded_is_left_out_of_collections() -> None:
    before, loaded = gc.get_freeze_count(), [[] for _ in range(1000)]
    try:
        set_aside()
        assert gc.get_freeze_count() >= before + len(loaded)
        assert len(gc.get_objects()) < 1000
        cycle: list[Any] = [_Node()]
        cycle[0].itself, gone = cycle, weakref.ref(cycle[0])
        gc.collect(1)  # the cycle is old then
        del cycle
        count = gc.get_stats()[2]["collections"]
        _ = [[] for _ in range(200_000)]
        assert gc.get_stats()[2]["collections"] > count
        assert gone() is None
    finally:
        gc.unfreeze()
