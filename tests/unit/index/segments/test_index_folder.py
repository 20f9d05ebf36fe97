"""Tests of index folders."""

import json

import numpy as np
import pytest

from retrieval_draft.errors import DatastoreError, TokenizerMismatchError
from retrieval_draft.index.corpus import Corpus, CorpusSource
from retrieval_draft.index.segments.index_folder import IndexFolder
from tests.support.snapshots import segment


@pytest.fixture
def index(tmp_path) -> IndexFolder:
    made = IndexFolder.create(tmp_path / "index", "f" * 32, 100, "name")
    made.publish([made.write(segment([7, 8, 9, 4])), made.write(segment([1, 2, 3]))])
    return made


def test_what_was_published_is_found(index) -> None:
    again = IndexFolder.open(index.path)
    assert again.manifest.tokens == 7
    assert again.manifest.documents == 2
    assert [each.num_tokens for each in again.segments()] == [4, 3]
    assert again.verify() == []
    session = CorpusSource([Corpus.open(index.path)]).open(np.array([7, 8], np.int32))
    assert session.propose(2).tokens.tolist() == [9, 4]


def test_several_corpora_are_asked_together(index, tmp_path) -> None:
    other = IndexFolder.create(tmp_path / "other", "f" * 32, 100)
    other.publish([other.write(segment([7, 8, 5], [7, 8, 5]))])
    session = CorpusSource([Corpus.open(index.path), Corpus.open(other.path)]).open(
        np.array([7, 8], np.int32)
    )
    assert session.propose(2).tokens.tolist() == [5, 9]


def test_what_is_not_published_does_not_count(index) -> None:
    index.write(segment([5, 5, 5]))
    again = IndexFolder.open(index.path)
    assert again.manifest.tokens == 7
    again.sweep()
    assert len(list(index.path.glob("segment-*"))) == 2


def test_another_tokenizer_is_refused(index) -> None:
    with pytest.raises(TokenizerMismatchError, match="fingerprint"):
        Corpus.open(index.path).folder.check("0" * 32, 100)
    with pytest.raises(TokenizerMismatchError, match="101 ids"):
        Corpus.open(index.path).folder.check("f" * 32, 101)
    with pytest.raises(TokenizerMismatchError):
        IndexFolder.create(index.path, "0" * 32, 100)


def test_no_index_there(tmp_path) -> None:
    with pytest.raises(DatastoreError, match=r"manifest\.json is missing"):
        IndexFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "torn"),
        (lambda text: text.replace('"tokens": 4', '"tokens": 5'), "altered"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "format version 2"),
        (lambda text: text.replace("retrieval_draft index", "something else"), "not the manifest"),
        (lambda text: json.dumps({**json.loads(text), "segments": 3}), "altered"),
        (lambda text: "[]", "not the manifest"),
    ],
)
def test_a_bad_manifest_is_told_apart(index, change, message: str) -> None:
    path = index.path / "manifest.json"
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(DatastoreError, match=message):
        IndexFolder.open(index.path)


def test_torn_missing_and_altered_files_are_named(index) -> None:
    first, second = (index.path / entry.name for entry in index.manifest.segments)
    content = bytearray((first / "tokens.npy").read_bytes())
    content[-3] ^= 1
    (first / "tokens.npy").write_bytes(bytes(content))
    (first / "suffixes.npy").write_bytes(b"")
    (second / "documents.npy").unlink()
    wrong = index.verify()
    assert len(wrong) == 3
    assert "tokens.npy was altered" in wrong[0]
    assert "suffixes.npy is torn" in wrong[1]
    assert "documents.npy cannot be read" in wrong[2]
    with pytest.raises(DatastoreError, match="torn"):
        Corpus.open(index.path)


def test_one_process_changes_it_at_a_time(index) -> None:
    with index.locked():
        other = IndexFolder.open(index.path)
        with pytest.raises(DatastoreError, match="another process"), other.locked():
            pass
    with other.locked():
        pass


def test_a_folder_with_other_things_is_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(DatastoreError, match="other files"):
        IndexFolder.create(tmp_path, "", 10)
    with pytest.raises(DatastoreError, match="is a file"):
        IndexFolder.create(tmp_path / "thesis.txt", "", 10)


def test_a_full_disk_leaves_the_index_as_it_was(index, monkeypatch) -> None:
    def full(path, array) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("retrieval_draft.index.segments.segment.save_array", full)
    with pytest.raises(DatastoreError, match="No space left"):
        index.write(segment([1, 2]))
    assert not list(index.path.glob("*.tmp"))
    assert IndexFolder.open(index.path).verify() == []


def test_readers_keep_what_they_opened(index) -> None:
    corpus = Corpus.open(index.path)
    index.publish([])
    index.sweep()
    session = CorpusSource([corpus]).open(np.array([7, 8], np.int32))
    assert session.propose(2).tokens.tolist() == [9, 4]
