"""Tests of building, extending and joining indexes."""

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from retrieval_draft.errors import DatastoreError, InvalidInputError, TokenizerMismatchError
from retrieval_draft.index.building import builder
from retrieval_draft.index.building.builder import BuildOptions, build_index
from retrieval_draft.index.building.documents import find_files
from retrieval_draft.index.building.encoder import Encoder
from retrieval_draft.index.building.journal import Journal
from retrieval_draft.index.building.merge import merge_indexes
from retrieval_draft.index.index_folder import IndexFolder
from tests.tiny import byte_tokenizer

ENCODER = Encoder(byte_tokenizer(), "bytes")


def empty(path: Path) -> IndexFolder:
    return IndexFolder.create(path, ENCODER.fingerprint, ENCODER.vocabulary, "bytes")


def texts(index: IndexFolder) -> list[str]:
    """What an index holds, document by document."""
    found = []
    for segment in index.segments():
        joined = segment.texts(ENCODER.vocabulary)
        for begin, end in pairwise([*segment.documents.tolist(), len(joined)]):
            found.append(ENCODER.decode(joined[begin : end - 1].astype(np.int32)))
    return found


def lines(folder: Path, name: str, documents: list[str]) -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def build(index: IndexFolder, *paths: str, **options) -> builder.BuildState:
    return build_index(index, find_files(paths), ENCODER, BuildOptions(**options))


def test_documents_come_back(tmp_path) -> None:
    path = lines(tmp_path, "a.jsonl", ["the cat", "sat on", "the mat"])
    index = empty(tmp_path / "index")
    state = build(index, path)
    assert texts(index) == ["the cat", "sat on", "the mat"]
    assert state.tokens == index.manifest.tokens == len("the catsat onthe mat")
    assert index.verify() == []
    assert not Journal.exists(index.path)
    assert not list(index.path.glob("run-*"))


def test_skip_and_limit(tmp_path) -> None:
    paths = [lines(tmp_path, "a.jsonl", ["one", "two"]), lines(tmp_path, "b.jsonl", ["three", "four"])]
    index = empty(tmp_path / "index")
    state = build(index, *paths, skip=1, limit=2)
    assert texts(index) == ["two", "three"]
    assert state.report.documents == 3  # what is behind the limit is not read


def test_long_documents_and_many_segments(tmp_path) -> None:
    documents = ["a" * 300, "b" * 10, "c" * 150]
    index = empty(tmp_path / "index")
    build(index, lines(tmp_path, "a.jsonl", documents), segment_tokens=100)
    assert "".join(texts(index)) == "".join(documents)
    assert len(index.manifest.segments) > 3
    assert all(entry.tokens + entry.documents <= 100 for entry in index.manifest.segments)


def test_added_documents_come_behind(tmp_path) -> None:
    index = empty(tmp_path / "index")
    build(index, lines(tmp_path, "a.jsonl", ["one", "two"]))
    build(index, lines(tmp_path, "b.jsonl", ["three"]))
    assert texts(index) == ["one", "two", "three"]
    assert len(index.manifest.segments) == 1  # small ones are joined


def test_replacing_leaves_nothing_of_the_old(tmp_path) -> None:
    index = empty(tmp_path / "index")
    build(index, lines(tmp_path, "a.jsonl", ["one", "two"]))
    files = find_files([lines(tmp_path, "b.jsonl", ["three"])])
    build_index(index, files, ENCODER, BuildOptions(), replace=True)
    assert texts(index) == ["three"]
    assert len(list(index.path.glob("segment-*"))) == 1


class StopError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("after", range(1, 8))
def test_an_interrupted_build_goes_on(tmp_path, monkeypatch, after: int) -> None:
    documents = [f"document {number} " * 3 for number in range(20)]
    path = lines(tmp_path, "a.jsonl", documents)
    index = empty(tmp_path / "index")
    monkeypatch.setattr(builder, "RUN_TOKENS", 128)
    saved = builder.save_journal
    count = 0

    def stop(*arguments: object) -> None:
        nonlocal count
        saved(*arguments)
        count += 1
        if count == after:
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(builder, "save_journal", stop)
        with pytest.raises(StopError):
            build(index, path, segment_tokens=512)
    assert IndexFolder.open(index.path).manifest.tokens == 0  # as it was before
    state = build(index, path, segment_tokens=512)
    assert state.resumed > 0
    assert "".join(texts(index)) == "".join(documents)
    assert index.verify() == []
    assert not list(index.path.glob("run-*"))


def test_a_process_that_ended_right_behind_publishing_adds_nothing_twice(tmp_path, monkeypatch) -> None:
    index = empty(tmp_path / "index")
    build(index, lines(tmp_path, "a.jsonl", ["one"]))
    path = lines(tmp_path, "b.jsonl", ["two", "three"])
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda folder: (_ for _ in ()).throw(StopError))
        with pytest.raises(StopError):
            build(index, path)
    assert texts(IndexFolder.open(index.path)) == ["one", "two", "three"]
    build(index, path)
    assert texts(index) == ["one", "two", "three"]
    assert not Journal.exists(index.path)
    build(index, path)  # asked for again, it is added again
    assert texts(index) == ["one", "two", "three", "two", "three"]


def test_other_work_does_not_go_on_with_a_journal(tmp_path, monkeypatch) -> None:
    path = lines(tmp_path, "a.jsonl", ["one " * 50, "two " * 50])
    index = empty(tmp_path / "index")
    monkeypatch.setattr(builder, "RUN_TOKENS", 128)
    with monkeypatch.context() as patch:
        patch.setattr(builder, "_sort_all", lambda *arguments: (_ for _ in ()).throw(StopError))
        with pytest.raises(StopError):
            build(index, path)
    Path(path).write_text(json.dumps({"text": "other"}) + "\n")
    os.utime(path, (1, 1))
    state = build(index, path)
    assert state.resumed == 0
    assert texts(index) == ["other"]


def test_joined_indexes_hold_everything(tmp_path) -> None:
    parts = []
    for name in ("a", "b", "c"):
        part = empty(tmp_path / name)
        build(part, lines(tmp_path, f"{name}.jsonl", [f"{name} one", f"{name} two"]))
        parts.append(part)
    target = empty(tmp_path / "all")
    merge_indexes(target, parts, most=20)
    assert texts(target) == ["a one", "a two", "b one", "b two", "c one", "c two"]
    assert len(target.manifest.segments) == 3  # full ones are taken as they are
    merge_indexes(target, [], most=1000)
    assert len(target.manifest.segments) == 1
    assert texts(target) == ["a one", "a two", "b one", "b two", "c one", "c two"]
    assert target.verify() == []
    assert texts(parts[0]) == ["a one", "a two"]


def test_indexes_of_two_tokenizers_are_not_joined(tmp_path) -> None:
    one = empty(tmp_path / "one")
    other = IndexFolder.create(tmp_path / "other", "0" * 32, 10)
    with pytest.raises(TokenizerMismatchError, match="cannot be joined"):
        merge_indexes(one, [other], most=100)
    with pytest.raises(TokenizerMismatchError):
        build(other, lines(tmp_path, "a.jsonl", ["x"]))


def test_two_builders_on_one_folder(tmp_path) -> None:
    index = empty(tmp_path / "index")
    with index.locked(), pytest.raises(DatastoreError, match="another process"):
        build(IndexFolder.open(index.path), lines(tmp_path, "a.jsonl", ["x"]))


def test_a_full_disk_keeps_the_old_index_and_what_is_finished(tmp_path, monkeypatch) -> None:
    index = empty(tmp_path / "index")
    build(index, lines(tmp_path, "a.jsonl", ["old"]))
    path = lines(tmp_path, "b.jsonl", ["new " * 60, "newer " * 60])
    monkeypatch.setattr(builder, "RUN_TOKENS", 256)

    def full(path, array) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("retrieval_draft.index.segment.save_array", full)
        with pytest.raises(DatastoreError, match="No space left"):
            build(index, path)
    assert texts(IndexFolder.open(index.path)) == ["old"]
    state = build(index, path)
    assert state.resumed == 2
    assert "".join(texts(index)) == "old" + "new " * 60 + "newer " * 60


@pytest.mark.parametrize("bad", [{"segment_tokens": 3}, {"workers": 0}, {"skip": -1}, {"limit": 0}])
def test_bad_options(bad: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        BuildOptions(**bad)
