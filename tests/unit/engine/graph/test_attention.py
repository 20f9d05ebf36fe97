"""Attention in one piece against attention head by head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retrieval_draft.engine.graph.attention import (
    GRAPH_ATTENTION,
    GRAPH_ATTENTION_EAGER,
    attend_in_full,
    graph_attention,
)
from tests.support.dispatched import Dispatched
from tests.support.models import make

MODULE = nn.Identity()
MODULE.num_key_value_groups = 2  # type: ignore[assignment]


def inputs(nodes: int = 5, keys: int = 24, dim: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.zeros(1, 1, nodes, keys).masked_fill_(torch.rand(1, 1, nodes, keys) < 0.4, torch.finfo().min)
    mask[..., 0] = 0
    return torch.randn(1, 4, nodes, dim), torch.randn(1, 2, keys, dim), torch.randn(1, 2, keys, dim + 2), mask


def slow(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    out = torch.empty(1, query.shape[2], query.shape[1], value.shape[-1])
    for head in range(query.shape[1]):
        for node in range(query.shape[2]):
            scores = key[0, head // 2] @ query[0, head, node] * 0.3
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = (scores + mask[0, 0, node]).exp()
            total = weights.sum() + (0 if sinks is None else sinks[head].exp())
            out[0, node, head] = weights @ value[0, head // 2] / total
    return out


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
@pytest.mark.parametrize("nodes", [1, 5])
def test_caps_and_sinks(softcap: float | None, sinks: Tensor | None, nodes: int) -> None:
    query, key, value, mask = inputs(nodes)
    expected = slow(query, key, value, mask, softcap, sinks)
    found = attend_in_full(query, key, value, mask, 0.3, softcap, sinks)
    assert torch.allclose(found.transpose(1, 2), expected, atol=1e-5)
    as_bool = attend_in_full(query, key, value, mask == 0, 0.3, softcap, sinks)
    assert torch.allclose(as_bool, found, atol=1e-6)
    options: dict[str, Any] = {"softcap": softcap, "s_aux": sinks}
    through = ALL_ATTENTION_FUNCTIONS[GRAPH_ATTENTION_EAGER](
        MODULE, query, key, value, mask, scaling=0.3, **options
    )
    assert torch.equal(through[0], found.transpose(1, 2))


@pytest.mark.parametrize("nodes", [1, 5])
def test_heads_that_share_keys_copy_none(nodes: int) -> None:
    query, key, value, mask = inputs(nodes)
    expected = slow(query, key, value, mask, None, None)
    with Dispatched() as calls:
        found, _ = ALL_ATTENTION_FUNCTIONS[GRAPH_ATTENTION](MODULE, query, key, value, mask, scaling=0.3)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not {"repeat", "index_select"} & set(calls.launches)


def test_calls_of_others_are_those_of_sdpa() -> None:
    """Another thread may use the model meanwhile: with several rows, without a mask."""
    query, key, value, _ = inputs(24)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"](MODULE, query, key, value, None, scaling=0.3)[0]
    ours = ALL_ATTENTION_FUNCTIONS[GRAPH_ATTENTION](MODULE, query, key, value, None, scaling=0.3)[0]
    assert torch.equal(ours, sdpa)
    rows = [torch.cat([each, each.flip(2)]) for each in (query, key, value)]
    mask = torch.ones(24, 24).tril().bool().expand(2, 1, -1, -1)
    wanted = ALL_ATTENTION_FUNCTIONS["sdpa"](MODULE, *rows, mask, scaling=0.3)[0]
    for name in (GRAPH_ATTENTION, GRAPH_ATTENTION_EAGER):
        found = ALL_ATTENTION_FUNCTIONS[name](MODULE, *rows, mask, scaling=0.3)[0]
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(("own", "name"), [("sdpa", GRAPH_ATTENTION), ("eager", GRAPH_ATTENTION_EAGER)])
def test_it_is_lent_for_the_context_alone(own: str, name: str) -> None:
    model = make("llama", attention=own)
    with graph_attention(model):
        assert model.config._attn_implementation == name
        with graph_attention(model):
            assert model.config._attn_implementation == name
    assert model.config._attn_implementation == own
