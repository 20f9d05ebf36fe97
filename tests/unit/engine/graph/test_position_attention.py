"""Attention by position: right, and the same in bits from any slots and beside any neighbours."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retrieval_draft.engine.graph.bitwise_pass import WIDTH
from retrieval_draft.engine.graph.position_attention import FAR, PositionLayout, attend_by_position
from tests.support.trees import ancestors, tree_of

DIM, VALUE = 8, 4


def layout_of(parents: list[int], length: int, keys: int, window: int | None) -> PositionLayout:
    tree = tree_of(list(range(len(parents))), parents)
    mask = torch.zeros(1)
    return PositionLayout.of_tree(
        torch.tensor([length]),
        torch.from_numpy(tree.depths.astype(np.int64)),
        torch.from_numpy(~ancestors(tree)),
        keys,
        {mask.data_ptr(): window},
    )


def states(seed: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (4 heads), keys and values (2 heads) of a text."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 4, positions, DIM), (1, 2, positions, DIM), (1, 2, positions, VALUE))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


def in_tree(
    text: tuple[Tensor, Tensor, Tensor],
    length: int,
    path: list[int],
    seed: int,
    bad: float = 1.0,
    window: int | None = None,
    **options: Any,
) -> Tensor:
    """Attention of the text's tokens from `length` on as nodes `path` of a tree; all others are random."""
    random = np.random.default_rng(seed)
    slots = -(-(length + WIDTH) // FAR) * FAR
    parents = [-1] + [int(random.integers(0, node)) for node in range(1, WIDTH)]
    for above, node in itertools.pairwise(path):
        parents[node] = above
    query, key, value = (each * bad for each in states(seed + 100, slots))
    query = query[:, :, :WIDTH]
    for held, new in ((key, text[1]), (value, text[2])):
        held[:, :, :length] = new[:, :, :length]
        for at, node in enumerate(path):
            held[:, :, length + node] = new[:, :, length + at]
    for at, node in enumerate(path):
        query[:, :, node] = text[0][:, :, length + at]
    layout = layout_of(parents, length, slots, window)
    return attend_by_position(query, key, value, layout, window, 0.3, **options)[:, :, path]


def written_out(
    text: tuple[Tensor, Tensor, Tensor],
    at: int,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one position, in float64: (heads, dim of values)."""
    query, key, value = (each.double()[0] for each in text)
    first = 0 if window is None else max(0, at - window + 1)
    out = []
    for head in range(len(query)):
        scores = key[head // 2, first : at + 1] @ query[head, at] * 0.3
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if sinks is not None:
            scores = torch.cat([scores, sinks[head : head + 1].double()])
        weights = scores.softmax(0)[: at + 1 - first]
        out.append(weights @ value[head // 2, first : at + 1])
    return torch.stack(out)


PATHS = (list(range(WIDTH)), [0, 9, 20, 30, 31], [0, 25, 26], [0, 1, 3, 7, 15, 31])


@pytest.mark.parametrize("length", [0, 31, 256, 300])
@pytest.mark.parametrize("window", [None, 40])
def test_bits_do_not_depend_on_slots(length: int, window: int | None) -> None:
    """Each token alone, as the root of a pass, against the same token as a draft after a shorter text."""
    text = states(0, length + WIDTH)
    variants: list[dict[str, Any]] = [{}, {"softcap": 2.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}]
    for options in variants:
        alone = [in_tree(text, at, [0], at, window=window, **options) for at in range(length, length + 5)]
        for seed, path in enumerate(PATHS):
            drafted = in_tree(text, length, path, seed, window=window, **options)
            for at, root in enumerate(alone[: len(path)]):
                assert torch.equal(drafted[:, :, at].view(torch.uint8), root[:, :, 0].view(torch.uint8))
        expected = written_out(text, length + 3, window, **options)
        assert torch.allclose(alone[3][0, :, 0].double(), expected, atol=0.02)


def test_values_of_rejected_drafts_weigh_nothing() -> None:
    """Not even where they are not finite: 0 times infinity is none."""
    text = states(3, 300 + WIDTH)
    path = [0, 9, 20, 31]
    usual, poisoned = (in_tree(text, 300, path, 7, bad) for bad in (1.0, float("inf")))
    assert torch.equal(usual, poisoned)
    assert poisoned.isfinite().all()
