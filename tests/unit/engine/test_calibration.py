from __future__ import annotations

import numpy as np

from retrieval_draft.engine.calibration import Calibration
from retrieval_draft.engine.fusion import fuse
from tests.unit.engine.test_fusion import proposal


def test_an_overconfident_source_is_believed_less_and_recovers() -> None:
    calibration = Calibration()
    guess = [proposal([1], [-1], [0.9])]
    first = fuse(0, guess, calibration, 4).probs[1]
    for _ in range(400):
        calibration.observe(fuse(0, guess, calibration, 4), guess, np.array([2], np.int32))
    wrong = fuse(0, guess, calibration, 4).probs[1]
    for _ in range(600):
        calibration.observe(fuse(0, guess, calibration, 4), guess, np.array([1], np.int32))
    right = fuse(0, guess, calibration, 4).probs[1]
    assert wrong < 0.2 < 0.8 < right <= 0.999
    np.testing.assert_allclose(first, 0.9, rtol=1e-5)


def test_only_children_of_accepted_nodes_are_outcomes() -> None:
    calibration = Calibration()
    guess = [proposal([1, 2, 3, 4], [-1, 0, -1, 2], [0.5, 0.5, 0.5, 0.5])]
    calibration.observe(fuse(0, guess, calibration, 8), guess, np.array([1, 9], np.int32))
    # 1 was accepted, 3 was not, 2 follows 1 and was not; nothing is known of 4, below the rejected 3.
    np.testing.assert_allclose(calibration.expected.sum(), 1.5, rtol=1e-5)
    assert calibration.accepted.sum() == 1


def test_sets_of_sources_are_told_apart() -> None:
    calibration = Calibration()
    alone, both = [proposal([1], [-1], [0.5])], [proposal([1], [-1], [0.3]), proposal([1], [-1], [0.3])]
    for _ in range(100):
        calibration.observe(fuse(0, alone, calibration, 4), alone, np.array([2], np.int32))
    assert fuse(0, alone, calibration, 4).probs[1] < 0.2
    untouched = fuse(0, both, Calibration(), 4).probs[1]
    assert fuse(0, both, calibration, 4).probs[1] == untouched


def test_weights_move_to_the_source_that_is_right() -> None:
    calibration = Calibration()
    right = [proposal([1, 2], [-1, -1], [0.9, 0.2]), proposal([1, 2], [-1, -1], [0.2, 0.9])]
    for _ in range(600):
        calibration.observe(fuse(0, right, calibration, 4), right, np.array([1], np.int32))
    mixed = fuse(0, right, calibration, 4)
    assert mixed.tokens[1] == 1
    assert mixed.probs[1] > 2 * mixed.probs[2]


def test_emitted_nothing_teaches_nothing() -> None:
    calibration = Calibration()
    guess = [proposal([1], [-1], [0.5])]
    calibration.observe(fuse(0, guess, calibration, 4), guess, np.empty(0, np.int32))
    assert calibration.expected.sum() == 0
