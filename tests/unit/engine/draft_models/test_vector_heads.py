"""Hydra's and Apple's heads against their formulas along a path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu

from retrieval_draft.engine.draft_models.head_files import load_head
from retrieval_draft.engine.draft_models.vector_heads import HydraHead, ReDrafter
from retrieval_draft.errors import ModelFileError
from tests.support.heads import write_head
from tests.support.models import make

MODEL = make("llama")
PATH = torch.tensor([5, 9, 11])


@torch.no_grad()
def test_hydra_sees_the_tokens_between(tmp_path: Path) -> None:
    head = load_head(write_head(tmp_path, "hydra"), MODEL)
    head.bind(MODEL)
    assert isinstance(head, HydraHead)
    state = vectors = torch.randn(1, 32)
    embedded = MODEL.get_input_embeddings()(PATH)
    for level in range(3):
        vectors, logits = head.step(level, PATH[level : level + 1], vectors)
        joined = torch.cat((state, embedded[: level + 1].reshape(1, -1)), -1)
        first, second = head.hydra_mlp[level]
        inner = first.res_connection(joined) + silu(first.linear(joined))
        inner = inner + silu(second.linear(inner))
        torch.testing.assert_close(logits, head.hydra_lm_head[level](inner))


@torch.no_grad()
@pytest.mark.parametrize("is_recurrent", [True, False])
def test_redrafter_adds_each_token_to_its_state(is_recurrent: bool) -> None:
    torch.manual_seed(0)
    head = ReDrafter(32, 64, 1, 97, is_recurrent)
    head.bind(MODEL)
    context = vectors = torch.randn(1, 32)
    embedded, state = MODEL.get_input_embeddings()(PATH), torch.zeros(1, 32)
    for level in range(3):
        vectors, logits = head.step(level, PATH[level : level + 1], vectors)
        state = embedded[level] + state if head.rnn_u is None else silu(
            head.rnn_w(embedded[level]) + head.rnn_u(state)
        )  # fmt: skip
        joined = torch.cat((context, state), -1)
        block, output = head.lm_head
        torch.testing.assert_close(logits, output(joined + silu(block.linear(joined))))


def test_other_kinds_of_hydra_are_refused(tmp_path: Path) -> None:
    name = write_head(tmp_path, "hydra", hydra_head_arch="prefix-mlp")
    with pytest.raises(ModelFileError, match="hydra_head_arch is 'prefix-mlp'"):
        load_head(name, MODEL)
