"""EAGLE's heads against the layers of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from retrieval_draft.engine.draft_models.expansion import ExpansionLimits, Growth
from retrieval_draft.engine.draft_models.head_files import load_head
from tests.support.heads import write_head
from tests.support.models import make

MODEL = make("llama")
ROWS = 7


def expected(head: Any, tokens: Tensor, vectors: Tensor) -> Tensor:
    """The head's states at rows of one text, by a layer of transformers."""
    config = head.config
    config._attn_implementation = "eager"
    layer: Any = LlamaDecoderLayer(config, 0)
    first = head.decoder[0]
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(layer.self_attn, name, getattr(first.self_attn, name))
    layer.self_attn.o_proj, layer.mlp = first.self_attn.o_proj, first.mlp
    layer.post_attention_layernorm = first.post_attention_layernorm
    factors = LlamaRotaryEmbedding(config)(vectors[None], torch.arange(len(tokens))[None])
    mask = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1)[None, None]
    embedded = head.embed_tokens(tokens)
    if hasattr(first, "hidden_norm"):
        normed = first.hidden_norm(vectors)
        taken = torch.cat((first.input_layernorm(embedded), normed), -1)
        attended = layer.self_attn(taken[None], position_embeddings=factors, attention_mask=mask)[0][0]
        states = normed + attended  # norm_before_residual is set
        return states + layer.mlp(layer.post_attention_layernorm(states))
    layer.input_layernorm = nn.Identity()
    states = head.fc(torch.cat((embedded, vectors), -1))
    out = layer(states[None], position_embeddings=factors, attention_mask=mask)
    return (out[0] if isinstance(out, tuple) else out).view(len(tokens), -1)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["eagle", "speculators eagle3"])
def test_states_are_those_of_transformers_and_a_path_of_the_tree_is_a_text(
    layout: str, tmp_path: Path
) -> None:
    head = load_head(write_head(tmp_path, layout), MODEL)
    head.bind(MODEL)
    tokens = torch.randint(0, 97, (ROWS,))
    hidden = torch.randn(ROWS, 32 * len(head.layers))
    state = head.state()
    head.read([state], [tokens[:3]], [hidden[:3]], [0])
    (logits,) = head.read([state], [tokens[3:]], [hidden[3:]], [3])
    vectors = head._taken(hidden)
    whole = expected(head, tokens, vectors)
    torch.testing.assert_close(logits, head._logits(whole[-1:]), atol=1e-4, rtol=1e-4)

    growth = Growth(ExpansionLimits(top_k=4, entropy_stop=None), 20, None, head.ids)
    growth.begin(int(tokens[-1]), logits)
    for _ in range(2):
        (added,) = head.expand([state], [growth])
        frontier = list(growth.frontier)
        for row, node in enumerate(frontier):
            path = []
            while node:
                path.insert(0, node)
                node = growth.parents[node]
            text, before = tokens, vectors
            for step in path:
                last = expected(head, text, before)[-1:]
                text = torch.cat((text, torch.tensor([growth.tokens[step]])))
                before = torch.cat((before, last))
            reached = head._logits(expected(head, text, before)[-1:])
            torch.testing.assert_close(added[row : row + 1], reached, atol=1e-3, rtol=1e-3)
        growth.add(added)
        if not growth.frontier:
            break
    head.drop(state)
    assert (state.length, state.keys.staged) == (ROWS, 0)
    half = state.copy(3)
    (again,) = head.read([half], [tokens[3:]], [hidden[3:]], [3])
    torch.testing.assert_close(again, logits)
