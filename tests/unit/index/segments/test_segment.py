"""Tests of suffix-sorted segments."""

import numpy as np
import pytest

from retrieval_draft.errors import DatastoreError, InvalidInputError
from retrieval_draft.index.segments.segment import Segment


def texts(*runs: list[int]) -> list[np.ndarray]:
    return [np.array(run, np.int32) for run in runs]


def test_worked_example() -> None:
    segment = Segment.build(texts([7, 8, 9], [7, 8, 5]), 10)
    assert segment.tokens.tolist() == [7, 8, 9, 10, 7, 8, 5, 10]
    assert segment.suffixes.tolist() == [6, 4, 0, 5, 1, 2]
    assert segment.documents.tolist() == [0, 4]
    assert segment.count(np.array([7, 8], np.int32)) == 2
    assert segment.count(np.array([9, 7], np.int32)) == 0
    assert segment.followers(np.array([7, 8], np.int32)) == {5: 1, 9: 1}


def test_equal_suffixes_stay_in_the_order_of_the_text() -> None:
    segment = Segment.build(texts([1, 2], [1, 2], [1, 2]), 3)
    assert segment.suffixes.tolist() == [0, 3, 6, 1, 4, 7]


def test_long_repetition_is_sorted_by_where_it_ends() -> None:
    segment = Segment.build(texts([4] * 300), 5)
    assert sorted(segment.suffixes.tolist()) == list(range(300))
    # The ends are shorter, and the end of a text (5) sorts above 4: the last position comes last.
    assert segment.suffixes.tolist()[-1] == 299
    assert segment.count(np.full(32, 4, np.int32)) == 269


@pytest.mark.parametrize(("vocabulary", "width"), [(10, 2), (65535, 2), (65536, 2), (65537, 4), (262144, 4)])
def test_width_of_tokens(vocabulary: int, width: int) -> None:
    last = vocabulary - 1
    segment = Segment.build(texts([last, 0, last], [last, 0, 3]), vocabulary)
    assert segment.tokens.dtype.itemsize == width
    assert segment.count(np.array([last, 0], np.int32)) == 2
    assert segment.followers(np.array([last, 0], np.int32)) == {3: 1, last: 1}
    assert segment.texts(vocabulary)[[3, 7]].tolist() == [vocabulary, vocabulary]


def test_a_vocabulary_of_65536_that_is_used_up_needs_four_bytes() -> None:
    every = np.arange(2**16, dtype=np.int32)
    segment = Segment.build([every], 2**16)
    assert segment.tokens.dtype == np.uint32
    assert segment.count(np.array([65534, 65535], np.int32)) == 1


def test_bytes_for_each_token() -> None:
    random = np.random.default_rng(0)
    for vocabulary, most in ((32000, 6.1), (262144, 8.1)):
        made = [random.integers(0, vocabulary, 700).astype(np.int32) for _ in range(200)]
        segment = Segment.build(made, vocabulary)
        assert segment.nbytes / segment.num_tokens <= most


@pytest.mark.parametrize("bad", [[3, -1], [3, 10]])
def test_ids_outside_the_vocabulary_are_refused(bad: list[int]) -> None:
    with pytest.raises(InvalidInputError, match=r"0\.\.9"):
        Segment.build(texts(bad), 10)


def test_nothing_is_a_segment_too(tmp_path) -> None:
    segment = Segment.build(texts([], []), 10)
    assert segment.num_tokens == 0
    assert segment.count(np.array([1], np.int32)) == 0
    files = segment.write(tmp_path / "s")
    again = open_again(tmp_path / "s", segment, files)
    assert again.num_tokens == 0


def open_again(folder, segment, files) -> Segment:
    sizes = {name: file["bytes"] for name, file in files.items()}
    return Segment.open(folder, segment.separator, segment.bits, sizes)


def test_written_and_mapped_again(tmp_path) -> None:
    segment = Segment.build(texts([7, 8, 9], [7, 8, 5]), 10)
    files = segment.write(tmp_path / "s")
    again = open_again(tmp_path / "s", segment, files)
    assert isinstance(again.tokens, np.memmap)
    assert again.count(np.array([7, 8], np.int32)) == 2
    assert again.suffixes.tolist() == segment.suffixes.tolist()


def test_a_torn_file_is_named(tmp_path) -> None:
    segment = Segment.build(texts([7, 8, 9]), 10)
    files = segment.write(tmp_path / "s")
    path = tmp_path / "s" / "suffixes.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatastoreError, match=r"suffixes\.npy is torn"):
        open_again(tmp_path / "s", segment, files)


def test_altered_positions_are_harmless(tmp_path) -> None:
    segment = Segment.build(texts([7, 8, 9] * 50), 10)
    files = segment.write(tmp_path / "s")
    path = tmp_path / "s" / "suffixes.npy"
    content = bytearray(path.read_bytes())
    content[-400:] = b"\x7f" * 400
    path.write_bytes(bytes(content))
    again = open_again(tmp_path / "s", segment, files)
    for context in ([7, 8], [8, 9, 7, 8, 9], [9]):
        again.count(np.array(context, np.int32))  # reads no memory that is not its own
