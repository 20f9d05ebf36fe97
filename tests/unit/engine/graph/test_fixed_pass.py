"""Masks of passes of fixed shape against a slow definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retrieval_draft.engine.graph.fixed_pass import tree_masks
from tests.support.trees import ancestors, tree_of

KEYS = 32


@pytest.mark.parametrize("window", [None, 1, 2, 5, 40])
def test_masks_over_slots(window: int | None) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        nodes, length = int(rng.integers(1, 9)), int(rng.integers(0, 20))
        parents = [-1] + [int(rng.integers(max(0, node - 3), node)) for node in range(1, nodes)]
        tree = tree_of([0] * nodes, parents)
        seen = ancestors(tree)
        masks = tree_masks(
            {"some": window, "full": None},
            torch.tensor([length]),
            torch.from_numpy(tree.depths.astype(np.int64))[None],
            torch.from_numpy(~seen)[None] if nodes > 1 else None,
            torch.arange(KEYS),
            torch.float32,
        )
        for kind, limit in (("some", window), ("full", None)):
            visible = masks[kind][0, 0] == 0
            assert masks[kind].shape == (1, 1, nodes, KEYS)
            assert masks[kind].isfinite().all()
            for node in range(nodes):
                position = length + int(tree.depths[node])
                for slot in range(KEYS):
                    is_text = slot < length
                    other = slot - length
                    at = slot if is_text else length + int(tree.depths[other]) if other < nodes else -1
                    known = is_text or (other < nodes and bool(seen[node, other]))
                    near = limit is None or position - at < limit
                    assert bool(visible[node, slot]) == (known and near), (node, slot)


def test_masks_of_rows_are_those_of_each_alone() -> None:
    rng = np.random.default_rng(1)
    rows = []
    for length in (0, 7, 20):
        parents = [-1] + [int(rng.integers(max(0, node - 3), node)) for node in range(1, 6)]
        tree = tree_of([0] * 6, parents)
        hidden = torch.from_numpy(~ancestors(tree))
        depths = torch.from_numpy(tree.depths.astype(np.int64))
        rows.append((torch.tensor([length]), depths[None], hidden[None]))
    windows = {"some": 5, "full": None}
    rest = torch.arange(KEYS), torch.float32
    together = tree_masks(windows, *(torch.cat(parts) for parts in zip(*rows, strict=True)), *rest)
    for row, given in enumerate(rows):
        alone = tree_masks(windows, *given, *rest)
        assert all(torch.equal(together[kind][row : row + 1], alone[kind]) for kind in windows)
