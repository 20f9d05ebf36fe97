"""The ways to decode that are compared, on a tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrieval_draft.bench.decoders import cudnn_attention, make_contestant
from retrieval_draft.errors import UnknownMethodError
from tests.support.models import make

IDS = list(range(3, 30))


@pytest.fixture(scope="module")
def model() -> Any:
    return make("llama")


@pytest.mark.parametrize(
    "name", ["stock", "stock-pld", "stock-compiled", "stock-no-cudnn", "none", "calibrated-no-cudnn"]
)
def test_every_contestant_says_the_same(model: Any, name: str) -> None:
    expected = make_contestant("stock", model, None, 8).generate(IDS, 12).tokens
    contestant = make_contestant(name, model, None, 8)
    run = contestant.generate(IDS, 12)
    assert contestant.name == name
    assert run.tokens == expected
    assert 0 < run.steps <= 11
    inputs = torch.tensor([IDS])
    options = {"max_new_tokens": 12, "do_sample": False}
    out = contestant.call({"input_ids": inputs, "attention_mask": torch.ones_like(inputs), **options})
    assert out[0, len(IDS) :].tolist() == expected


def test_plain_decoding_takes_a_step_a_token(model: Any) -> None:
    for name in ("stock", "stock-compiled", "none-no-cudnn"):
        run = make_contestant(name, model, None, None).generate(IDS, 9)
        assert (run.steps, run.nodes) == (8, 0)


def test_cudnn_is_off_inside_alone() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with cudnn_attention(False):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        with cudnn_attention(True):
            assert torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_contestant_without_cudnn_runs_without_it(model: Any) -> None:
    seen: list[bool] = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    with cudnn_attention(True):
        for name, wanted in (("none-no-cudnn", False), ("none", True)):
            seen.clear()
            make_contestant(name, model, None, None).generate(IDS, 4)
            assert set(seen) == {wanted}
    hook.remove()


@pytest.mark.parametrize("name", ["stok", "stok-no-cudnn", "-no-cudnn"])
def test_unknown_contestant_is_named(model: Any, name: str) -> None:
    with pytest.raises(UnknownMethodError, match="Unknown method"):
        make_contestant(name, model, None, None)
