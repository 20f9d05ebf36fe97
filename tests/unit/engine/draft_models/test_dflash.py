"""DFlash's block against its layers written out, and reads in parts against one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from retrieval_draft import RetrievalDrafter
from retrieval_draft.engine.draft_models.head_files import load_head
from retrieval_draft.errors import InvalidInputError, ModelFileError
from tests.support.heads import DIM, GROUPS, HEADS, write_head
from tests.support.models import make

MODEL = make("llama")
ROWS = 7


def expected(head: Any, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Logits of the block after one text, with all rows at once."""
    rows = len(tokens)
    context = head.hidden_norm(head.fc(hidden))
    block = torch.tensor([int(tokens[-1]), 96, 96, 96])
    states = MODEL.get_input_embeddings()(block)
    cos, sin = Qwen3RotaryEmbedding(head.rotary.config)(states[None], torch.arange(rows + 4)[None])
    for layer in head.decoder:
        attention, normed = layer.self_attn, layer.input_layernorm(states)
        both = torch.cat((context, normed))
        query = attention.q_norm(attention.q_proj(normed).view(4, HEADS, DIM)).transpose(0, 1)
        key = attention.k_norm(attention.k_proj(both).view(rows + 4, GROUPS, DIM)).transpose(0, 1)
        value = attention.v_proj(both).view(rows + 4, GROUPS, DIM).transpose(0, 1)
        query, _ = apply_rotary_pos_emb(query[None], query[None], cos[:, -4:], sin[:, -4:])
        key, _ = apply_rotary_pos_emb(key[None], key[None], cos, sin)
        shared = HEADS // GROUPS
        scores = query @ key.repeat_interleave(shared, 1).transpose(-1, -2) / DIM**0.5
        seen = scores.softmax(-1) @ value[None].repeat_interleave(shared, 1)
        states = states + attention.o_proj(seen[0].transpose(0, 1).reshape(4, -1))
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    logits: Tensor = MODEL.get_output_embeddings()(head.norm(states))
    return logits[1:]


@torch.no_grad()
def test_a_block_is_guessed_by_states_and_masks(tmp_path: Path) -> None:
    head = load_head(write_head(tmp_path, "dflash"), MODEL)
    assert head.layers == (1, -1)
    head.bind(MODEL)
    tokens, hidden = torch.randint(0, 96, (2, ROWS)), torch.randn(2, ROWS, 64)
    states = [head.state() for _ in range(2)]
    head.read(states[:1], [tokens[0, :3]], [hidden[0, :3]], [0])
    head.read(states, [tokens[0, 3:], tokens[1]], [hidden[0, 3:], hidden[1]], [3, 0])
    for state, ids, rows in zip(states, tokens, hidden, strict=True):
        torch.testing.assert_close(state.guesses, expected(head, ids, rows), atol=1e-4, rtol=1e-3)
        assert (state.length, state.keys.staged) == (ROWS, 0)
    half = states[0].copy(3)
    head.read([half], [tokens[0, 3:]], [hidden[0, 3:]], [3])
    torch.testing.assert_close(half.guesses, states[0].guesses)


@torch.no_grad()
def test_a_vocabulary_of_its_own_has_its_own_output_head(tmp_path: Path) -> None:
    name = write_head(tmp_path, "speculators dflash")
    weights = load_file(tmp_path / "model.safetensors")
    head = load_head(name, MODEL)
    head.bind(MODEL)
    assert head.layers == (1, -1)
    kept = weights["t2d"].nonzero()[:, 0]
    assert head.ids.tolist() == kept.tolist()
    tokens, hidden = torch.randint(0, 96, (ROWS,)), torch.randn(ROWS, 64)
    state = head.state()
    head.read([state], [tokens], [hidden], [0])
    whole = load_head(write_head(tmp_path, "speculators dflash"), MODEL)
    whole.bind(MODEL)
    whole.lm_head = None  # the target's, which `expected` takes
    other = whole.state()
    whole.read([other], [tokens], [hidden], [0])
    torch.testing.assert_close(other.guesses, expected(whole, tokens, hidden), atol=1e-4, rtol=1e-3)
    assert state.guesses.shape == (3, len(kept))
    del weights["d2t"], weights["t2d"]
    save_file(weights, tmp_path / "model.safetensors")
    same = load_head(name, MODEL)
    assert (same.lm_head, same.ids) == (None, None)


@pytest.mark.parametrize("change", [{"projector_type": "domino"}, {"sample_from_anchor": True}])
def test_another_kind_of_block_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=next(iter(change))):
        load_head(write_head(tmp_path, "speculators dflash", **change), MODEL)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers of sliding_attention"),
        ({"dflash_config": {"target_layer_ids": [0, 2]}}, "mask_token_id"),
        ({"block_size": 1}, "block_size is 1"),
    ],
)
def test_what_is_not_supported_is_refused(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    name = write_head(tmp_path, "dflash", **change)
    with pytest.raises(ModelFileError) as raised:
        load_head(name, MODEL)
    assert name in str(raised.value)
    assert expected in str(raised.value)


def test_a_mask_or_layer_that_the_target_has_not_is_refused(tmp_path: Path) -> None:
    name = write_head(tmp_path, "dflash", dflash_config={"mask_token_id": 97, "target_layer_ids": [0, 2]})
    with pytest.raises(InvalidInputError, match="mask is token 97; the model has 97"):
        RetrievalDrafter.for_model(MODEL, draft_model=name)
    config = json.loads((tmp_path / "config.json").read_text())
    config["dflash_config"] = {"mask_token_id": 96, "target_layer_ids": [0, 9]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInputError, match=r"layer 10; the model has layers 0\.\.2"):
        RetrievalDrafter.for_model(MODEL, draft_model=name)
