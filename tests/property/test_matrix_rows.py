"""Rows that are merged, packed and written: order of merges, a twin of the encoding, hostile bytes."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_draft.errors import DatastoreError, RetrievalDraftError, TokenizerMismatchError
from retrieval_draft.index.adjacency import AdjacencyMatrix
from retrieval_draft.index.matrix_file import matrix_bytes, merge_bytes
from retrieval_draft.index.matrix_rows import LEAST_PROB, MOST_VISITS, MatrixRows, pack_rows, unpack_rows

VOCABULARY = 100
ROW = st.tuples(
    st.integers(0, 7).map(lambda number: 2 * number + (number << 40) + 1),
    st.integers(1, 300),
    st.dictionaries(st.integers(0, 7), st.integers(1, 1000), min_size=1, max_size=8),
)
Twin = dict[int, tuple[int, dict[int, float]]]


def rows_of(drawn: list[tuple[int, int, dict[int, int]]]) -> MatrixRows:
    tokens, probs = np.full((len(drawn), 8), -1, np.int32), np.zeros((len(drawn), 8), np.float32)
    for index, (_, _, weights) in enumerate(drawn):
        best = sorted(weights, key=lambda token: (-weights[token], token))
        tokens[index, : len(best)] = best
        total = sum(weights.values()) * 1.001
        probs[index, : len(best)] = [weights[token] / total for token in best]
    return MatrixRows(
        np.array([key for key, _, _ in drawn], np.uint64),
        np.array([visits for _, visits, _ in drawn], np.int32),
        np.zeros(len(drawn), np.int32),
        tokens,
        probs,
    )


def twin_of(parts: list[MatrixRows]) -> Twin:
    """Sums of all parts' observations, by key."""
    found: Twin = {}
    for rows in parts:
        for key, visits, tokens, probs in zip(rows.keys, rows.visits, rows.tokens, rows.probs, strict=True):
            count, sums = found.setdefault(int(key), (0, {}))
            for token, prob in zip(tokens.tolist(), probs.tolist(), strict=True):
                if token >= 0:
                    sums[token] = sums.get(token, 0.0) + prob * int(visits)
            found[int(key)] = (count + int(visits), sums)
    return found


def assert_same(matrix: AdjacencyMatrix, expected: Twin) -> None:
    rows = matrix.rows()
    assert sorted(rows.keys.tolist()) == sorted(expected)
    for key, visits, tokens, probs in zip(rows.keys, rows.visits, rows.tokens, rows.probs, strict=True):
        count, sums = expected[int(key)]
        assert visits == count
        assert np.all(np.diff(probs) <= 0)
        found = dict(zip(tokens.tolist(), probs.tolist(), strict=True))
        found.pop(-1, None)
        assert found == pytest.approx({token: total / count for token, total in sums.items()}, abs=1e-5)


@given(st.lists(st.lists(ROW, min_size=1, max_size=5), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_merges_in_any_order_are_the_sums(drawn: list[list[tuple[int, int, dict[int, int]]]]) -> None:
    parts = [rows_of(part) for part in drawn]
    expected = twin_of(parts)
    for order in list(permutations(parts))[:6]:
        matrix = AdjacencyMatrix(rows=1 << 10, top_k=8, cap=MOST_VISITS)
        for part in order:
            matrix.merge(part)
        assert_same(matrix, expected)
    # In two groups, each merged first: (a + b) + (c + d).
    whole = AdjacencyMatrix(rows=1 << 10, top_k=8, cap=MOST_VISITS)
    for group in (parts[::2], parts[1::2]):
        half = AdjacencyMatrix(rows=1 << 10, top_k=8, cap=MOST_VISITS)
        for part in group:
            half.merge(part)
        whole.merge(half.rows())
    assert_same(whole, expected)


def test_many_parts_give_the_sum_too() -> None:
    draw = np.random.default_rng(3)
    matrix, parts = AdjacencyMatrix(rows=1 << 10, top_k=8, cap=MOST_VISITS), []
    for _ in range(500):
        weights = {int(token): int(draw.integers(1, 99)) for token in draw.choice(8, 3, replace=False)}
        parts.append(rows_of([(5, int(draw.integers(1, 256)), weights)]))
        matrix.merge(parts[-1])
    assert_same(matrix, twin_of(parts))


def unpacked_by_hand(packed: bytes) -> list[tuple[int, int, list[tuple[int, float]]]]:
    """A naive reader: byte by byte, as the format is described."""
    assert packed[0] == 2
    count = int.from_bytes(packed[1:5], "little")
    keys = [int.from_bytes(packed[6 + 8 * row : 14 + 8 * row], "little") for row in range(count)]
    at = 6 + 8 * count
    visits, sizes = list(packed[at : at + count]), list(packed[at + count : at + 2 * count])
    at += 2 * count
    total = sum(sizes)
    ids = [int.from_bytes(packed[at + 2 * each : at + 2 * each + 2], "little") for each in range(total)]
    probs = [2.0 ** (-code / 16) for code in packed[at + 2 * total :]]
    rows = []
    for row in range(count):
        begin = sum(sizes[:row])
        pairs = list(zip(ids, probs, strict=True))[begin : begin + sizes[row]]
        rows.append((keys[row], visits[row], pairs))
    return rows


@given(st.lists(ROW, min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_packed_rows_are_those_that_a_naive_reader_finds(
    drawn: list[tuple[int, int, dict[int, int]]],
) -> None:
    rows = rows_of(drawn)
    packed = pack_rows(rows, VOCABULARY)
    found = unpack_rows(packed, VOCABULARY, 8, 100)
    for index, (key, visits, pairs) in enumerate(unpacked_by_hand(packed)):
        assert (key, visits) == (rows.keys[index], min(rows.visits[index], 255))
        assert (found.keys[index], found.visits[index]) == (key, visits)
        sent = rows.probs[index] >= LEAST_PROB
        sent &= rows.tokens[index] >= 0
        assert [token for token, _ in pairs] == rows.tokens[index][sent].tolist()
        np.testing.assert_allclose([prob for _, prob in pairs], rows.probs[index][sent], rtol=0.0225)
        over = max(sum(prob for _, prob in pairs), 1.0)
        np.testing.assert_allclose(
            found.probs[index][: len(pairs)], [prob / over for _, prob in pairs], rtol=1e-5
        )


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_sound_rows_or_refused(packed: bytes) -> None:
    for begin in (b"", b"\x02\x01\x00\x00\x00\x08"):
        try:
            rows = unpack_rows(begin + packed, VOCABULARY, 8, 100)
        except DatastoreError:
            continue
        rows.check(VOCABULARY)
        assert len(rows) <= 100


@given(st.lists(ROW, min_size=1, max_size=3), st.data())
@settings(max_examples=100, deadline=None)
def test_a_changed_byte_is_sound_or_refused(
    drawn: list[tuple[int, int, dict[int, int]]], data: st.DataObject
) -> None:
    packed = bytearray(pack_rows(rows_of(drawn), VOCABULARY))
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(packed)))
    for torn in (bytes(packed), bytes(packed[:cut])):
        try:
            unpack_rows(torn, VOCABULARY, 8, 100).check(VOCABULARY)
        except DatastoreError:
            continue


@given(st.lists(ROW, min_size=1, max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_a_torn_or_altered_file_changes_nothing(
    drawn: list[tuple[int, int, dict[int, int]]], data: st.DataObject
) -> None:
    matrix = AdjacencyMatrix(rows=64, top_k=8)
    matrix.merge(rows_of(drawn))
    content = bytearray(matrix_bytes(matrix, "f"))
    index = data.draw(st.integers(0, len(content) - 1))
    content[index] ^= data.draw(st.integers(1, 255))
    for torn in (bytes(content), bytes(content[:index])):
        other = AdjacencyMatrix(rows=64, top_k=8)
        with pytest.raises(RetrievalDraftError):
            merge_bytes(other, torn, "f", VOCABULARY)
        assert other.filled == 0


def test_a_file_is_merged_as_it_was(tmp_path: Path) -> None:
    matrix, other = AdjacencyMatrix(rows=64, top_k=8), AdjacencyMatrix(rows=128, top_k=4)
    matrix.merge(rows_of([(5, 3, {1: 5, 2: 3, 7: 1}), (9, 16, {4: 1})]))
    matrix.merge_frequent(np.array([4, 9], np.int32), np.array([2.0, 0.5], np.float32))
    merge_bytes(other, matrix_bytes(matrix, "f"), "f", VOCABULARY)
    mine, found = matrix.rows(), other.rows()
    order = np.argsort(mine.keys), np.argsort(found.keys)
    for name in ("keys", "visits", "times"):
        np.testing.assert_array_equal(getattr(mine, name)[order[0]], getattr(found, name)[order[1]])
    np.testing.assert_array_equal(mine.probs[order[0]][:, :4], found.probs[order[1]])
    assert [each.tolist() for each in other.frequent()] == [[4, 9], [2.0, 0.5]]
    with pytest.raises(TokenizerMismatchError, match="belongs to the tokenizer"):
        merge_bytes(other, matrix_bytes(matrix, "f"), "g", VOCABULARY)
    with pytest.raises(DatastoreError, match="never learned"):
        merge_bytes(other, matrix_bytes(_only_rows(matrix), "f"), "f", 6)


def _only_rows(matrix: AdjacencyMatrix) -> AdjacencyMatrix:
    made = AdjacencyMatrix(rows=64, top_k=8)
    made.merge(matrix.rows())
    return made
