"""Synthetic passes: their nodes lie within the longest text of a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from retrieval_draft.drafting.cost import SIZES
from retrieval_draft.engine.chain_target import ChainTarget
from retrieval_draft.engine.passes import tree_passes
from retrieval_draft.engine.target import Target
from tests.support.chain_models import make_family
from tests.support.models import make


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(("longest", "room"), [(512, 64), (100, 64), (48, 47)])
def test_chains_end_with_the_longest_text(longest: int, room: int) -> None:
    # Learned positions: one beyond the longest text raises.
    target = ChainTarget(make_family("gpt_neo", max_position_embeddings=longest))
    forward = tree_passes(target, 128)
    assert [len(forward(nodes)) for nodes in SIZES] == [min(nodes, room) for nodes in SIZES]


def test_children_of_one_root_share_a_position() -> None:
    forward = tree_passes(Target(make("llama", max_position_embeddings=48)), 128)
    assert [len(forward(nodes)) for nodes in SIZES] == list(SIZES)
