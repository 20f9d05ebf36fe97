from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

from retrieval_draft.config import DRAFT_MODEL, SOURCES
from retrieval_draft.drafting._kernels import fusion
from retrieval_draft.drafting.calibration import AGREEMENT, AGREEMENT_ODDS, FEATURES, Calibration, columns_of
from retrieval_draft.drafting.calibration_format import (
    FIRST_SOURCES,
    FIRST_VERSION,
    SECOND_VERSION,
    VERSION,
)
from retrieval_draft.drafting.fusion import fuse
from retrieval_draft.errors import DatastoreError, InvalidInputError
from retrieval_draft.index.source import Proposal
from tests.support.sources import proposal_of as proposal

TABLE = {spec.slot for spec in (*SOURCES.values(), DRAFT_MODEL)}
FREE = [slot for slot in range(fusion.SOURCES) if slot not in TABLE]
"""Slots of no source of the table, which a new line there takes one of."""


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
        for length, emitted in ((1, 2), (12, 1)):
            guess = [evidence(0.5, length)]
            calibration.observe(fuse(0, guess, calibration, 4), guess, np.array([emitted], np.int32))
    short, long = (fuse(0, [evidence(0.5, length)], calibration, 4).probs[1] for length in (1, 12))
    assert short < 0.2 < 0.8 < long
    blind = Calibration(priors=False, without=FEATURES)
    for _ in range(400):
        for length, emitted in ((1, 2), (12, 1)):
            guess = [evidence(0.5, length)]
            blind.observe(fuse(0, guess, blind, 4), guess, np.array([emitted], np.int32))
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
        emitted = 2 if sure else 1
        calibration.observe(fuse(0, guess, calibration, 4), guess, np.array([emitted], np.int32))
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
    Calibration().save(path)
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "version":
        path.write_bytes(save({"weights": np.zeros(3, np.float32)}, {"version": "99"}))
    else:
        write(path, {name: np.zeros(3, np.float32) for name in load_file(path)})
    calibration = Calibration(priors=False)
    before = calibration.weights.copy()
    with pytest.raises(DatastoreError, match="Delete it"):
        calibration.load(path)
    np.testing.assert_array_equal(calibration.weights, before)


def write(path: Path, arrays: dict[str, np.ndarray], **about: str) -> None:
    """A file of today's format, sources by their names in the table."""
    names = [""] * fusion.SOURCES
    for spec in (*SOURCES.values(), DRAFT_MODEL):
        names[spec.slot] = spec.name
    path.write_bytes(save(arrays, {"version": VERSION, "sources": json.dumps(names), **about}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sets", np.array([3, 3], np.int32)),
        ("sets", np.array([4, 3], np.int32)),
        ("sets", np.array([-1, 3], np.int32)),
        ("sets", np.array([1, 1 << fusion.SOURCES], np.int32)),
        ("sets", np.array([1.0, 2.0], np.float32)),
        ("sets", np.array([[1], [2]], np.int32)),
        ("weights", np.zeros((3, fusion.SOURCES + 1), np.float32)),
        ("parameters", np.zeros((fusion.SOURCES, 1), np.float32)),
        ("sources", "{"),
        ("sources", '"automaton"'),
        ("sources", "[1, 2]"),
        ("sources", json.dumps(["automaton", "automaton", *[""] * 10])),
        ("sources", json.dumps([f"source {number}" for number in range(fusion.SOURCES + 1)])),
    ],
)
def test_sets_and_names_of_a_file_are_checked(tmp_path: Path, name: str, value: np.ndarray | str) -> None:
    path = tmp_path / "c.safetensors"
    arrays = {
        "sets": np.array([1, 3], np.int32),
        "weights": np.zeros((2, fusion.SOURCES + 1), np.float32),
        "expected": np.zeros((2, fusion.BINS), np.float32),
        "accepted": np.zeros((2, fusion.BINS), np.float32),
        "sharpness": np.zeros((2, 2), np.float32),
        "parameters": np.zeros((fusion.SOURCES, fusion.PARAMETERS), np.float32),
    }
    write(path, arrays)
    Calibration().load(path)
    if isinstance(value, str):
        write(path, arrays, **{name: value})
    else:
        write(path, {**arrays, name: value})
    with pytest.raises(DatastoreError, match="Delete it"):
        Calibration().load(path)


def test_unknown_evidence_is_named() -> None:
    with pytest.raises(InvalidInputError, match="'colour'"):
        Calibration(without=["colour"])


def test_sources_of_the_table_keep_their_slots_and_others_take_what_is_free() -> None:
    def slots(*names: str) -> list[int]:
        columns, used = columns_of(names)
        return [[slot for slot in range(12) if used >> slot & 1][column] for column in columns]

    first, *more = FREE
    last = fusion.SOURCES - 1
    assert last == FREE[-1], "the shared slot is of no source of the table"
    assert slots("automaton", "corpus", "mine") == [0, 4, first]
    assert slots("corpus") == [4]
    assert slots("model", "model", "a") == [6, first, more[0]]
    assert slots(*SOURCES, "model", "mine") == [*(spec.slot for spec in SOURCES.values()), 6, first]
    assert slots(*(f"s{number}" for number in range(len(FREE) + 2))) == [*FREE, last, last]
    assert columns_of(())[1] == 0


def test_more_sources_than_slots_still_make_a_tree_and_teach() -> None:
    proposals = [proposal([number % 3], [-1], [0.5], f"source {number}") for number in range(20)]
    calibration = Calibration()
    before = calibration.weights.copy()
    tree = fuse(0, proposals, calibration, 8)
    assert sorted(tree.tokens[1:].tolist()) == [0, 1, 2]
    calibration.observe(tree, proposals, np.array([1], np.int32))
    assert not np.array_equal(calibration.weights, before)


@pytest.mark.parametrize("priors", [True, False])
def test_a_free_slot_starts_as_any_lookup(priors: bool) -> None:
    """Neither a draft model's weights nor the siblings', nor what was learned of another source."""
    calibration = Calibration(priors)
    for slot in FREE:
        assert calibration.weights[1 << slot, slot] == 1.0
        assert calibration.weights[1 << slot, -1] == 0.0
        for other in (0, 1, 2, 3, 4, 5):
            both = calibration.weights[1 << slot | 1 << other]
            assert both[[slot, other, -1]].tolist() == [AGREEMENT / 2, AGREEMENT / 2, AGREEMENT_ODDS]
        assert not calibration.parameters[slot].any()
    tree = fuse(0, [proposal([5], [-1], [0.3], "mine")], calibration, 4)
    np.testing.assert_allclose(tree.probs[1], 0.3, rtol=1e-6)


def test_what_is_learned_of_a_source_outside_the_table_is_its_own_and_not_kept(tmp_path: Path) -> None:
    calibration = Calibration()
    guess = [proposal([1], [-1], [0.9], "mine"), proposal([1], [-1], [0.9], "automaton")]
    before = calibration.weights.copy()
    for _ in range(20):
        calibration.observe(fuse(0, guess, calibration, 4), guess, np.array([2], np.int32))
    moved = np.flatnonzero((calibration.weights != before).any(1))
    assert moved.tolist() == [1 << FREE[0] | 1]
    calibration.save(tmp_path / "c.safetensors")
    again = Calibration()
    again.load(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(again.weights[moved], Calibration(priors=False).weights[moved])
    assert not again.parameters[FREE[0]].any()
    np.testing.assert_allclose(again.parameters[0], calibration.parameters[0], rtol=1e-6)


def test_a_file_knows_sources_by_name(tmp_path: Path) -> None:
    """Slots may change from release to release, and sources may go."""
    path = tmp_path / "c.safetensors"
    rng = np.random.default_rng(0)
    names = ["history", "gone", "automaton"]
    arrays = {
        "sets": np.arange(8, dtype=np.int32),
        "weights": rng.random((8, 4), np.float32),
        "expected": rng.random((8, fusion.BINS), np.float32),
        "accepted": rng.random((8, fusion.BINS), np.float32),
        "sharpness": rng.random((8, 2), np.float32),
        "parameters": rng.random((3, fusion.PARAMETERS), np.float32),
    }
    write(path, arrays, sources=json.dumps(names))
    calibration = Calibration()
    calibration.load(path)
    # History is bit 0 in the file and slot 2 here, the automaton bit 2 and slot 0.
    for held, here in ((1, 4), (4, 1), (5, 5)):
        weights = calibration.weights[here]
        assert weights[[2, 0, -1]].tolist() == arrays["weights"][held, [0, 2, 3]].tolist()
        assert np.count_nonzero(weights) == 3
        cells = calibration.expected.reshape(-1, fusion.BINS)
        np.testing.assert_array_equal(cells[here], arrays["expected"][held])
        np.testing.assert_array_equal(calibration.sharpness[here], arrays["sharpness"][held])
    np.testing.assert_array_equal(calibration.parameters[2], arrays["parameters"][0])
    start = Calibration(priors=False)
    np.testing.assert_array_equal(calibration.weights[6:], start.weights[6:])
    np.testing.assert_array_equal(calibration.parameters[3:], start.parameters[3:])


OLD = Path(__file__).parents[2] / "data" / "calibration_v1.safetensors"
"""Written by the release of format 1, which taught it all eight sources it could tell apart."""


def test_a_file_of_version_1_is_understood_to_the_last_number() -> None:
    old = load_file(OLD)
    assert old["weights"].shape == (256, 9)
    calibration = Calibration()
    calibration.load(OLD)
    # The table keeps the sources of then in their slots, so sets of sources have the same numbers.
    slots = {spec.name: spec.slot for spec in (*SOURCES.values(), DRAFT_MODEL)}
    assert [slots[name] for name in FIRST_SOURCES] == list(range(8))
    np.testing.assert_array_equal(calibration.weights[:256, [*range(8), 12]], old["weights"])
    assert not calibration.weights[:256, 8:12].any()
    np.testing.assert_array_equal(calibration.expected[:4096], old["expected"])
    np.testing.assert_array_equal(calibration.accepted[:4096], old["accepted"])
    np.testing.assert_array_equal(calibration.sharpness[:256], old["sharpness"])
    starts = {"scale": 0, "length": 80, "depth": 160, "rank": 224, "absent": 264, "absent beside model": 272}
    for slot in range(8):
        parts = [
            old["parameters"][first + slot * size : first + (slot + 1) * size]
            for first, size in zip(starts.values(), (10, 10, 8, 5, 1, 1), strict=True)
        ]
        expected = np.concatenate([*parts, np.zeros(fusion.TIMES)])  # later terms
        np.testing.assert_array_equal(calibration.parameters[slot], expected)
    fresh = Calibration(priors=False)
    np.testing.assert_array_equal(calibration.weights[256:], fresh.weights[256:])
    np.testing.assert_array_equal(calibration.parameters[8:], fresh.parameters[8:])
    assert not calibration.expected[4096:].any()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (FIRST_SOURCES, [0.228501797, 0.21119979, 0.204479471, 0.351619303, 0.25656718, 0.207101807]),
        (
            ("automaton", "history", "model", "siblings"),
            [0.135247752, 0.131829605, 0.131561145, 0.24793832, 0.177446082, 0.158144549],
        ),
    ],
)
def test_a_file_of_version_1_gives_the_estimates_that_it_gave(
    tmp_path: Path, names: tuple[str, ...], expected: list[float]
) -> None:
    """The numbers are what the release of format 1 printed for these proposals and this file."""
    first = Calibration()
    first.load(OLD)
    first.save(tmp_path / "c.safetensors")
    saved = Calibration()
    saved.load(tmp_path / "c.safetensors")
    guess = [
        Proposal(
            np.array([1 + number % 3, 4], np.int32), np.array([-1, 0], np.int32),
            np.array([0.2 + 0.08 * number, 0.5], np.float32), np.array([number, 2 * number], np.int32),
            name, "request",
        )
        for number, name in enumerate(names)
    ]  # fmt: skip
    for calibration in (first, saved):
        tree = fuse(0, guess, calibration.open(), 8)
        np.testing.assert_allclose(tree.probs[1:], expected, rtol=1e-6)


def test_files_of_version_1_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    old = load_file(OLD)
    for name, value in (
        ("weights", old["weights"][:255]),
        ("parameters", old["parameters"][:279]),
        ("parameters", np.append(old["parameters"], np.zeros(8, np.float32))),
        ("expected", old["expected"][:-16]),
        ("accepted", -old["accepted"] - 1),
        ("sharpness", old["sharpness"][:, :1].copy()),
    ):
        path.write_bytes(save({**old, name: value}, {"version": FIRST_VERSION}))
        with pytest.raises(DatastoreError, match="Delete it"):
            Calibration().load(path)
    path.write_bytes(save({k: v for k, v in old.items() if k != "sharpness"}, {"version": FIRST_VERSION}))
    calibration = Calibration()
    calibration.load(path)
    np.testing.assert_array_equal(calibration.sharpness, Calibration(priors=False).sharpness)


def test_a_file_is_as_large_as_what_it_knows(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    Calibration(priors=False).save(path)
    assert path.stat().st_size < 4096
    calibration = Calibration()
    calibration.load(OLD)
    calibration.save(path)
    assert path.stat().st_size < 1.2 * OLD.stat().st_size
    with safe_open(path, "numpy") as file:
        assert file.metadata()["version"] == VERSION != FIRST_VERSION  # older releases refuse it by that


def test_a_request_copies_nothing_that_it_shares() -> None:
    calibration = Calibration()
    opened = calibration.open()
    for name in ("weights", "parameters", "expected", "accepted", "sharpness"):
        assert getattr(opened, name) is getattr(calibration, name)


def test_tokens_that_the_request_repeats_are_told_from_new_ones() -> None:
    """By counters of one request: another one starts from its own prompt."""
    calibration = Calibration(priors=False)
    guess = [proposal([7, 9], [-1, -1], [0.4, 0.4])]
    for _ in range(300):
        opened = calibration.open(np.array([7, 7, 8], np.int32))
        opened.observe(fuse(0, guess, opened, 4), guess, np.array([7], np.int32))
        opened.count(np.array([7], np.int32))
        assert opened.occurrences[[7, 8, 9]].tolist() == [3, 1, 0]
        opened.observe(fuse(0, guess, opened, 4), guess, np.array([7], np.int32))
        opened.count(np.array([7], np.int32))
        assert opened.occurrences[7] == 3, "more are not told apart"
    for prompt, first in (([7, 7, 7], 7), ([9, 9, 9], 9)):
        tree = fuse(0, guess, calibration.open(np.array(prompt, np.int32)), 4)
        assert tree.tokens[1] == first
        assert tree.probs[1] > tree.probs[2] + 0.1
    without = Calibration(priors=False, without=["occurrences"])
    for _ in range(50):
        opened = without.open(np.array([7, 7, 8], np.int32))
        opened.observe(fuse(0, guess, opened, 4), guess, np.array([7], np.int32))
    assert not without.parameters[:, fusion.TIMES_BIAS :].any()


def test_files_of_version_2_have_no_terms_of_occurrences(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    calibration = Calibration()
    calibration.parameters[0] = np.arange(fusion.PARAMETERS)
    calibration.save(path)
    held = load_file(path)
    held["parameters"] = held["parameters"][:, : fusion.TIMES_BIAS].copy()
    write(path, held, version=SECOND_VERSION)
    other = Calibration()
    other.load(path)
    expected = np.where(np.arange(fusion.PARAMETERS) < fusion.TIMES_BIAS, calibration.parameters, 0.0)
    np.testing.assert_array_equal(other.parameters[0], expected[0])
    write(path, held)
    with pytest.raises(DatastoreError, match="parameters"):
        other.load(path)


def test_the_shipped_priors_are_there() -> None:
    assert not np.array_equal(Calibration().weights, Calibration(priors=False).weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30, -1e30])
@pytest.mark.parametrize("name", ["weights", "parameters", "expected", "accepted", "sharpness"])
def test_numbers_that_are_never_learned_are_refused(tmp_path: Path, name: str, bad: float) -> None:
    path = tmp_path / "c.safetensors"
    calibration = Calibration()
    getattr(calibration, name)[3] = bad
    calibration.save(path)
    before = Calibration()
    with pytest.raises(DatastoreError, match=name):
        before.load(path)
    np.testing.assert_array_equal(before.weights, Calibration().weights)


@pytest.mark.parametrize("kind", [np.int8, np.float64, np.uint64, np.bool_])
def test_arrays_of_another_kind_are_numbers_or_refused(tmp_path: Path, kind: type) -> None:
    path = tmp_path / "c.safetensors"
    calibration = Calibration()
    calibration.save(path)
    held = load_file(path)
    write(path, {name: held[name] if name == "sets" else held[name].astype(kind) for name in held})
    with suppress(DatastoreError):  # a negative weight is a huge number without a sign
        calibration.load(path)
    assert np.isfinite(calibration.weights).all()


def test_what_is_no_calibration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    Calibration().save(path)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    rows, columns = load_file(path)["weights"].shape
    shape = b"[%d,%d]" % (rows, columns)
    assert shape in whole
    contents = [
        b"", b"\xff" * 8, whole[:-1], whole[: size // 2], whole + b"x", b"\xff" * 7 + b"\x7f" + whole[8:],
        whole.replace(b'"F32"', b'"F64"'), whole.replace(b'"F32"', b'"X32"'),
        whole.replace(shape, b"[%d,%d]" % (columns, rows)),
        whole.replace(shape, b"[-" + shape[2:]), whole.replace(b'"weights"', b'"weighty"'),
    ]  # fmt: skip
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(DatastoreError, match="Delete it"):
            Calibration().load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DatastoreError, match="Delete it"):
        Calibration().load(path)
