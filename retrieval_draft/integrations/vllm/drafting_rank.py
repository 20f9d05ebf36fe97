"""Choice of the vLLM worker that drafts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["DraftingRank"]

Drafts = list[list[int]]


class DraftingRank:
    """Makes one rank of a tensor-parallel group draft, so that all ranks verify the same drafts.

    Costs are timed and histories merged in the background, so two processes would soon draft differently. In
    vLLM the scheduler takes the drafts of the first rank and sends them to all workers with the next step;
    the others' are discarded, and so they make none. Under ``external_launcher`` each rank has a scheduler of
    its own: there the first rank's drafts are broadcast.

    Args:
        parallel_config: vLLM's.
        group: Its tensor-parallel group; None to ask vLLM for it.

    Attributes:
        drafts: Whether this process drafts.
        broadcasts: Whether drafts are broadcast.
    """

    def __init__(self, parallel_config: Any, group: Any = None) -> None:
        self._group = group
        self.drafts, self.broadcasts = True, False
        if parallel_config.tensor_parallel_size == 1:
            return
        if group is None:
            self._group = importlib.import_module("vllm.distributed.parallel_state").get_tp_group()
        self.drafts = self._group.rank_in_group == 0
        self.broadcasts = parallel_config.distributed_executor_backend == "external_launcher"

    def share(self, rows: int, make: Callable[[], Drafts]) -> Drafts:
        """The drafts of a step, the same on every rank that will use them.

        Args:
            rows: Number of rows in the batch.
            make: Makes the drafts; never raises.
        """
        drafts = make() if self.drafts else [[] for _ in range(rows)]
        if self.broadcasts:
            shared: Drafts = self._group.broadcast_object(drafts, src=0)
            return shared
        return drafts
