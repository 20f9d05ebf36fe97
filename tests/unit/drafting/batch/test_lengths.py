"""How long the chains of a batch should be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_draft.drafting.batch import choose_lengths
from retrieval_draft.errors import InvalidInputError

CHAINS = st.lists(
    st.lists(st.floats(0.05, 1.0), max_size=3).map(lambda each: np.cumprod(each).tolist()),
    min_size=1,
    max_size=4,
)


def _padded(chains: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    probs = np.zeros((len(chains), 3), np.float32)
    for row, chain in enumerate(chains):
        probs[row, : len(chain)] = chain
    return probs, np.array([len(chain) for chain in chains], np.int32)


def test_the_rows_compete() -> None:
    probs = np.array([[0.9, 0.8], [0.3, 0.0]], np.float32)
    lengths = choose_lengths(probs, np.array([2, 1], np.int32), [1.0, 1.1, 1.2, 1.3])
    assert lengths.tolist() == [2, 0]


def test_all_is_kept_where_tokens_cost_nothing_and_none_where_they_cost_a_step() -> None:
    probs, sizes = _padded([[0.5, 0.1], [0.9]])
    assert choose_lengths(probs, sizes, [1.0]).tolist() == [2, 1]
    assert choose_lengths(probs, sizes, [1.0, 2.0, 3.0, 4.0]).tolist() == [0, 0]


@given(CHAINS, st.lists(st.floats(0.01, 0.5), min_size=1, max_size=14))
def test_no_other_choice_yields_more(chains: list[list[float]], steps: list[float]) -> None:
    probs, sizes = _padded(chains)
    costs = np.cumsum([1.0, *steps])
    slope = costs[-1] - costs[-2]
    times = [costs[n] if n < len(costs) else costs[-1] + slope * (n - len(costs) + 1) for n in range(13)]
    lengths = choose_lengths(probs, sizes, costs)
    assert lengths.dtype == np.int32
    assert (lengths >= 0).all()
    assert (lengths <= sizes).all()

    def worth(chosen: tuple[int, ...]) -> float:
        gain = sum(float(probs[row, :size].sum(dtype=np.float64)) for row, size in enumerate(chosen))
        return float((len(chains) + gain) / times[sum(chosen)])

    best = max(worth(each) for each in itertools.product(*(range(size + 1) for size in sizes)))
    assert worth(tuple(lengths.tolist())) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(
    ("probs", "sizes", "costs"),
    [
        (np.zeros(3, np.float32), [0, 0, 0], [1.0]),
        (np.zeros((2, 3), np.float32), [0], [1.0]),
        (np.zeros((1, 3), np.float32), [4], [1.0]),
        (np.zeros((1, 3), np.float32), [1], []),
        (np.zeros((1, 3), np.float32), [1], [0.0]),
        (np.zeros((1, 3), np.float32), [1], [1.0, float("nan")]),
    ],
)
def test_what_does_not_fit_is_refused(probs: np.ndarray, sizes: list[int], costs: list[float]) -> None:
    with pytest.raises(InvalidInputError):
        choose_lengths(probs, np.array(sizes, np.int32), costs)
