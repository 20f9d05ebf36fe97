"""The length at which rotary factors change, and what may be passed together."""

from __future__ import annotations

import pytest
from torch import nn

from retrieval_draft.engine.rope_switch import RopeSwitch, rope_switch
from retrieval_draft.errors import UnsupportedModelError
from tests.support.models import CONFIGS, SWITCH, make


def test_trees_end_below_the_switch_and_are_free_beyond() -> None:
    switch = RopeSwitch(48)
    assert [switch.max_depth(root, 6) for root in (10, 41, 42, 46, 47, 48, 90)] == [6, 6, 5, 1, 0, 6, 6]
    growing = RopeSwitch(48, rotary=(nn.Identity(),))
    assert [growing.max_depth(root, 6) for root in (10, 46, 47, 48, 90)] == [6, 1, 0, 0, 0]


def test_rows_share_a_pass_on_one_side_only() -> None:
    roots = [47, 48, 3, 60]
    assert RopeSwitch(48).shared(roots) == [[0, 2], [1, 3]]
    assert RopeSwitch(48, rotary=(nn.Identity(),)).shared(roots) == [[0, 2], [1], [3]]
    assert RopeSwitch(48).shared([]) == []


@pytest.mark.parametrize(
    ("end", "whole", "wanted", "growing"),
    [(20, 48, None, None), (20, 49, 48, 48), (48, 49, 48, 48), (49, 60, None, 59), (60, 60, None, None)],
)
def test_a_part_of_a_text_has_the_factors_of_the_whole(
    end: int, whole: int, wanted: int | None, growing: int | None
) -> None:
    assert RopeSwitch(48).extra_position(end, whole) == wanted
    assert RopeSwitch(48, rotary=(nn.Identity(),)).extra_position(end, whole) == growing


@pytest.mark.parametrize("name", CONFIGS)
def test_ordinary_models_have_no_switch(name: str) -> None:
    assert rope_switch(make(name)) is None


@pytest.mark.parametrize(
    ("name", "renews", "modules"),
    [("phi3", True, 0), ("llama-longrope", False, 0), ("llama-dynamic", False, 1)],
)
def test_switches_of_models(name: str, renews: bool, modules: int) -> None:
    found = rope_switch(make(name))
    assert found is not None
    assert (found.length, found.renews, len(found.rotary)) == (SWITCH, renews, modules)


def test_layers_that_switch_at_different_lengths_are_refused() -> None:
    model = make("gemma3")
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model.config.rope_parameters = {
        "full_attention": dynamic,
        "sliding_attention": {"rope_type": "longrope", "original_max_position_embeddings": 64},
    }
    with pytest.raises(UnsupportedModelError, match="different lengths"):
        rope_switch(model)
    model.config.rope_parameters["sliding_attention"] = {"rope_type": "default"}
    found = rope_switch(model)
    assert found is not None
    assert found.length == model.config.max_position_embeddings
