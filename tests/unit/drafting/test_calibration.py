from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from retrieval_draft.drafting._kernels.fusion import MODEL
from retrieval_draft.drafting.calibration import FEATURES, PLACES, VERSION, Calibration, places_of
from retrieval_draft.drafting.fusion import fuse
from retrieval_draft.errors import DatastoreError, InvalidInputError
from retrieval_draft.index.source import Proposal
from tests.support.sources import proposal_of as proposal


def test_an_overconfident_source_is_believed_less_and_recovers() -> None:
    calibration = Calibration(priors=False)
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
    calibration = Calibration(priors=False)
    guess = [proposal([1, 2, 3, 4], [-1, 0, -1, 2], [0.5, 0.5, 0.5, 0.5])]
    calibration.observe(fuse(0, guess, calibration, 8), guess, np.array([1, 9], np.int32))
    # 1 was accepted, 3 was not, 2 follows 1 and was not; nothing is known of 4, below the rejected 3.
    np.testing.assert_allclose(calibration.expected.sum(), 1.5, rtol=1e-5)
    assert calibration.accepted.sum() == 1


def test_sets_of_sources_are_told_apart() -> None:
    calibration = Calibration(priors=False)
    alone, both = [proposal([1], [-1], [0.5])], [proposal([1], [-1], [0.3]), proposal([1], [-1], [0.3])]
    for _ in range(100):
        calibration.observe(fuse(0, alone, calibration, 4), alone, np.array([2], np.int32))
    assert fuse(0, alone, calibration, 4).probs[1] < 0.2
    # Something of it is the source's own and reaches the pair, but far less.
    untouched = fuse(0, both, Calibration(priors=False), 4).probs[1]
    assert 0.15 < fuse(0, both, calibration, 4).probs[1] < untouched


def test_weights_move_to_the_source_that_is_right() -> None:
    calibration = Calibration(priors=False)
    right = [proposal([1, 2], [-1, -1], [0.9, 0.2]), proposal([1, 2], [-1, -1], [0.2, 0.9])]
    for _ in range(600):
        calibration.observe(fuse(0, right, calibration, 4), right, np.array([1], np.int32))
    mixed = fuse(0, right, calibration, 4)
    assert mixed.tokens[1] == 1
    assert mixed.probs[1] > 2 * mixed.probs[2]


def test_emitted_nothing_teaches_nothing() -> None:
    calibration = Calibration(priors=False)
    guess = [proposal([1], [-1], [0.5])]
    calibration.observe(fuse(0, guess, calibration, 4), guess, np.empty(0, np.int32))
    assert calibration.expected.sum() == 0


def evidence(prob: float, length: int) -> Proposal:
    one = proposal([1], [-1], [prob], "automaton")
    return replace(one, match_lengths=np.array([length], np.int32))


def test_match_length_tells_equal_estimates_apart() -> None:
    calibration = Calibration(priors=False)
    for _ in range(400):
        for length, said in ((1, 2), (12, 1)):
            guess = [evidence(0.5, length)]
            calibration.observe(fuse(0, guess, calibration, 4), guess, np.array([said], np.int32))
    short, long = (fuse(0, [evidence(0.5, length)], calibration, 4).probs[1] for length in (1, 12))
    assert short < 0.2 < 0.8 < long
    blind = Calibration(priors=False, without=FEATURES)
    for _ in range(400):
        for length, said in ((1, 2), (12, 1)):
            guess = [evidence(0.5, length)]
            blind.observe(fuse(0, guess, blind, 4), guess, np.array([said], np.int32))
    short, long = (fuse(0, [evidence(0.5, length)], blind, 4).probs[1] for length in (1, 12))
    assert short == long


def test_a_source_that_is_sure_of_something_else_is_evidence_against() -> None:
    calibration = Calibration(priors=False)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        sure = rng.random() < 0.5
        guess = [
            proposal([1], [-1], [0.5], "automaton"),
            proposal([2], [-1], [0.95 if sure else 0.05], "history"),
        ]
        said = 2 if sure else 1
        calibration.observe(fuse(0, guess, calibration, 4), guess, np.array([said], np.int32))
    probs = []
    for prob in (0.95, 0.05):
        guess = [proposal([1], [-1], [0.5], "automaton"), proposal([2], [-1], [prob], "history")]
        tree = fuse(0, guess, calibration, 4)
        probs.append(float(tree.probs[tree.tokens.tolist().index(1)]))
    assert probs[0] < 0.3 < 0.6 < probs[1]


def test_what_a_request_shows_ends_with_it() -> None:
    calibration = Calibration(priors=False, without=["cells"])
    guess = [proposal([1], [-1], [0.5])]
    first = calibration.open()
    for _ in range(30):
        first.observe(fuse(0, guess, first, 4), guess, np.array([2], np.int32))
    inside, behind = (fuse(0, guess, opened, 4).probs[1] for opened in (first, calibration.open()))
    assert inside < 0.85 * behind
    assert behind < 0.5, "what all requests share was learned too"


def test_outcomes_are_told() -> None:
    calibration = Calibration(priors=False)
    guess = [proposal([1, 2, 3, 4], [-1, 0, -1, 2], [0.5, 0.4, 0.3, 0.2])]
    tree = fuse(0, guess, calibration, 8)
    outcomes = calibration.observe(tree, guess, np.array([1, 9], np.int32))
    told = {int(token): int(outcome) for token, outcome in zip(tree.tokens, outcomes, strict=True)}
    assert told == {0: -1, 1: 1, 2: 0, 3: 0, 4: -1}


def test_saved_and_loaded(tmp_path: Path) -> None:
    calibration = Calibration(priors=False)
    guess = [proposal([1], [-1], [0.9], "history")]
    for _ in range(50):
        calibration.observe(fuse(0, guess, calibration, 4), guess, np.array([2], np.int32))
    calibration.save(tmp_path / "c.safetensors")
    other = Calibration()
    other.load(tmp_path / "c.safetensors")
    learned, known = (fuse(0, guess, c.open(), 4).probs[1] for c in (calibration, other))
    np.testing.assert_allclose(known, learned, rtol=1e-5)


@pytest.mark.parametrize("damage", ["torn", "version", "shape"])
def test_a_bad_file_is_refused_and_changes_nothing(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.safetensors"
    Calibration(priors=False).save(path)
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "version":
        path.write_bytes(save({"weights": np.zeros(3, np.float32)}, {"version": "99"}))
    else:
        names = ("weights", "parameters", "expected", "accepted")
        path.write_bytes(save({name: np.zeros(3, np.float32) for name in names}, {"version": VERSION}))
    calibration = Calibration(priors=False)
    before = calibration.weights.copy()
    with pytest.raises(DatastoreError, match="Delete it"):
        calibration.load(path)
    np.testing.assert_array_equal(calibration.weights, before)


def test_unknown_evidence_is_named() -> None:
    with pytest.raises(InvalidInputError, match="'colour'"):
        Calibration(without=["colour"])


def test_known_sources_keep_their_place_and_others_take_what_is_free() -> None:
    assert places_of(("automaton", "corpus", "mine")).tolist() == [0, 4, 5]
    assert places_of(("corpus",)).tolist() == [4]
    assert places_of(("model", "model", "a", "b")).tolist() == [6, 5, 4, 3]
    assert len(places_of(tuple(f"s{i}" for i in range(12)))) == 12


def test_the_kernels_know_the_models_place() -> None:
    assert PLACES.index("model") == MODEL


def test_the_shipped_priors_are_there() -> None:
    assert not np.array_equal(Calibration().weights, Calibration(priors=False).weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30, -1e30])
@pytest.mark.parametrize("name", ["weights", "parameters", "expected", "accepted", "sharpness"])
def test_numbers_that_are_never_learned_are_refused(tmp_path: Path, name: str, bad: float) -> None:
    path = tmp_path / "c.safetensors"
    calibration = Calibration()
    getattr(calibration, name)[-1] = bad
    calibration.save(path)
    before = Calibration()
    with pytest.raises(DatastoreError, match=name):
        before.load(path)
    np.testing.assert_array_equal(before.weights, Calibration().weights)


@pytest.mark.parametrize("kind", [np.int8, np.float64, np.uint64, np.bool_])
def test_arrays_of_another_kind_are_numbers_or_refused(tmp_path: Path, kind: type) -> None:
    path = tmp_path / "c.safetensors"
    calibration = Calibration()
    names = ("weights", "parameters", "expected", "accepted", "sharpness")
    path.write_bytes(
        save({each: getattr(calibration, each).astype(kind) for each in names}, {"version": VERSION})
    )
    calibration.load(path)
    assert np.isfinite(calibration.weights).all()


def test_what_is_no_calibration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    Calibration().save(path)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    contents = [
        b"", b"\xff" * 8, whole[:-1], whole[: size // 2], whole + b"x", b"\xff" * 7 + b"\x7f" + whole[8:],
        whole.replace(b'"F32"', b'"F64"'), whole.replace(b'"F32"', b'"X32"'),
        whole.replace(b"[256,9]", b"[9,256]"),
        whole.replace(b"[256,9]", b"[-56,9]"), whole.replace(b'"weights"', b'"weighty"'),
    ]  # fmt: skip
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(DatastoreError, match="Delete it"):
            Calibration().load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DatastoreError, match="Delete it"):
        Calibration().load(path)
