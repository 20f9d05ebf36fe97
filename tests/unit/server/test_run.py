from __future__ import annotations

import gc

from retrieval_draft.server.run import set_aside


def test_what_was_loaded_is_left_out_of_collections() -> None:
    before, loaded = gc.get_freeze_count(), [[] for _ in range(1000)]
    try:
        set_aside()
        assert gc.get_freeze_count() >= before + len(loaded)
        assert len(gc.get_objects()) < 1000
    finally:
        gc.unfreeze()
