"""As many tokens as cost no more than reading the weights."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.drafting.cost import SIZES
from retrieval_draft.drafting.roofline import RooflineCost

DRAFTS = np.full(500, 0.01, np.float32)


def roofline(seconds_of_weights: float, seconds_a_token: float) -> RooflineCost:
    model = RooflineCost()
    model.load({size: max(seconds_of_weights, size * seconds_a_token) for size in SIZES})
    return model


@pytest.mark.parametrize(("knee", "drafts"), [(1, 0), (2, 1), (8, 7), (15.5, 14), (32, 31)])
def test_the_knee_is_where_both_take_as_long(knee: float, drafts: int) -> None:
    model = roofline(1.0, 1 / knee)
    assert model.knee == pytest.approx(knee, rel=0.02)
    assert model.choose(DRAFTS) == drafts
    assert model.choose(DRAFTS[:5]) == min(drafts, 5), "however improbable, as long as there are any"


def test_a_device_without_a_knee_has_the_published_limits() -> None:
    flat = roofline(1.0, 1e-6)
    drafts = {rows: flat.choose(DRAFTS, 0, rows) for rows in (1, 2, 3, 4, 6, 8)}
    assert drafts == {1: 31, 2: 62, 3: 60, 4: 92, 6: 90, 8: 184}


def test_rows_share_the_tokens() -> None:
    model = roofline(1.0, 1 / 16).for_rows(4)
    assert isinstance(model, RooflineCost)
    assert model.choose(DRAFTS, 0, 4) == 12
    assert model.choose(DRAFTS, 0, 32) == 0


def test_nothing_measured_and_tokens_that_are_repeated() -> None:
    assert RooflineCost().choose(DRAFTS) == 0
    assert roofline(1.0, 1 / 16).choose(DRAFTS, carried=10) == 5
