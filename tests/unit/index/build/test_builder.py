"""Tests of building, extending and joining indexes."""

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from retrieval_draft.errors import DatastoreError, InvalidInputError, TokenizerMismatchError
from retrieval_draft.index.build import builder
from retrieval_draft.index.build import encoder as encoder_module
from retrieval_draft.index.build.builder import build_index
from retrieval_draft.index.build.documents import ReadReport, find_files
from retrieval_draft.index.build.encoder import Encoder
from retrieval_draft.index.build.journal import Journal
from retrieval_draft.index.build.merge import merge_indexes
from retrieval_draft.index.build.options import BuildOptions
from retrieval_draft.index.build.shards import build_shard
from retrieval_draft.index.segments.index_folder import IndexFolder
from tests.support.tiny import byte_tokenizer

ENCODER = Encoder(byte_tokenizer(), "bytes")


def empty(path: Path) -> IndexFolder:
    return IndexFolder.create(path, ENCODER.fingerprint, ENCODER.vocabulary, "bytes")


def texts(index: IndexFolder) -> list[str]:
    """The documents that an index holds."""
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


@contextmanager
def interruption(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[None]:
    """A block whose build ends when it has written its journal for the nth time."""
    saved, count = builder.save_journal, 0

    def stop(*arguments: object) -> None:
        nonlocal count
        saved(*arguments)
        count += 1
        if count == after:
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(builder, "save_journal", stop)
        with pytest.raises(StopError):
            yield


@pytest.mark.parametrize("after", range(1, 8))
def test_an_interrupted_build_goes_on(tmp_path, monkeypatch, after: int) -> None:
    documents = [f"document {number} " * 3 for number in range(20)]
    path = lines(tmp_path, "a.jsonl", documents)
    index = empty(tmp_path / "index")
    monkeypatch.setattr(builder, "RUN_TOKENS", 128)
    with interruption(monkeypatch, after):
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
        patch.setattr("retrieval_draft.index.segments.segment.save_array", full)
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


def bad_and_good(folder: Path) -> list[str]:
    """Files with something bad in each, and 31 good documents."""
    folder.mkdir()
    good = [json.dumps({"text": f"document {number} " * 3}) for number in range(30)]
    (folder / "a.jsonl").write_text("\n".join([*good[:10], '{"text": "\\ud83d"}', "[" * 9999, *good[10:20]]))
    (folder / "b.jsonl").write_text('{"body": "x"}\n' * 3)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(good[20:]).encode()) + b"garbage")
    (folder / "d.txt").write_bytes(b"one\ntwo\ncaf\xe9\nthree\n")
    (folder / "e.bin").write_bytes(b"\0\1")
    return [str(folder)]


BAD = {
    "half a surrogate pair": 1,
    "nested too deeply": 1,
    "no text column": 1,
    "torn": 1,
    "not UTF-8": 1,
    "binary": 1,
}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_bad_record_ends_no_build(tmp_path, workers: int) -> None:
    index = empty(tmp_path / "index")
    state = build(index, *bad_and_good(tmp_path / "data"), workers=workers)
    assert index.manifest.documents == state.report.documents == 31
    assert texts(index)[-1] == "one\ntwo\nthree\n"
    assert state.report.reasons == BAD
    assert state.report.skipped == 6
    assert f"{tmp_path}/data/a.jsonl, line 11: half a surrogate pair" in state.report.named


@pytest.mark.parametrize("after", range(1, 9))
def test_what_was_left_out_is_known_after_an_interruption(tmp_path, monkeypatch, after: int) -> None:
    paths = bad_and_good(tmp_path / "data")
    index = empty(tmp_path / "index")
    monkeypatch.setattr(builder, "RUN_TOKENS", 256)
    monkeypatch.setattr(builder, "_BATCH_TEXTS", 3)
    with interruption(monkeypatch, after):
        build(index, *paths)
    state = build(index, *paths)
    whole = empty(tmp_path / "whole")
    expected = build(whole, *paths).report
    assert (state.report.reasons, state.report.named) == (expected.reasons, expected.named)
    assert "".join(texts(index)) == "".join(texts(whole))


def test_shards_leave_out_the_same(tmp_path) -> None:
    files = find_files(bad_and_good(tmp_path / "data"))
    index = empty(tmp_path / "index")
    tokenizer = ENCODER.to_json()
    every = ReadReport()
    documents = 0
    for file in files:
        entries, report, _ = build_shard(str(index.path), [file], tokenizer, "bytes", BuildOptions())
        documents += sum(entry.documents for entry in entries)
        every.merge(report)
    assert documents == every.documents == 31
    assert every.reasons == BAD
    assert "b.jsonl has no field 'text'" in every.no_column


def test_a_column_that_no_file_has_is_a_mistake_each_time(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
    (tmp_path / "b.bin").write_bytes(b"\0")
    index = empty(tmp_path / "index")
    for _ in range(2):
        with pytest.raises(InvalidInputError, match=r"a\.jsonl has no field 'text' with text; it has 'body'"):
            build(index, str(tmp_path / "a.jsonl"), str(tmp_path / "b.bin"))
    build(index, str(tmp_path / "a.jsonl"), text_column="body")
    assert texts(index) == ["x", "y"]


def test_a_text_that_the_tokenizer_cannot_take_costs_that_text(tmp_path, monkeypatch) -> None:
    encode = Encoder.encode

    def picky(self: Encoder, batch: list[str]) -> list[np.ndarray]:
        if any("bad" in text for text in batch):
            raise TypeError("TextEncodeInput must be Union[...]")
        return encode(self, batch)

    monkeypatch.setattr(Encoder, "encode", picky)
    documents = ["one", "bad", "two", "three", "bad too", "four", "five"]
    index = empty(tmp_path / "index")
    path = lines(tmp_path, "a.jsonl", documents)
    state = build(index, path)
    assert texts(index) == ["one", "two", "three", "four", "five"]
    assert state.report.documents == 5
    assert state.report.named == [f"{path}, document 1: not tokenised", f"{path}, document 4: not tokenised"]


def test_a_long_text_is_tokenised_in_pieces(monkeypatch) -> None:
    monkeypatch.setattr(encoder_module, "_PIECE", 10)
    sizes: list[int] = []
    ids = Encoder._ids

    def noted(self: Encoder, batch: list[str]) -> list[np.ndarray]:
        sizes.extend(map(len, batch))
        return ids(self, batch)

    monkeypatch.setattr(Encoder, "_ids", noted)
    long = "short\n" * 5 + "x" * 25
    found = ENCODER.encode(["a", long, ""])
    assert [ENCODER.decode(each) for each in found] == ["a", long, ""]
    assert max(sizes) <= 10


def test_a_file_that_vanishes_before_the_build(tmp_path) -> None:
    paths = [lines(tmp_path, "a.jsonl", ["one"]), lines(tmp_path, "b.jsonl", ["two"])]
    files = find_files(paths)
    Path(paths[0]).unlink()
    index = empty(tmp_path / "index")
    state = build_index(index, files, ENCODER, BuildOptions())
    assert texts(index) == ["two"]
    assert state.report.reasons == {"unreadable": 1}


def test_a_pipe_is_something_else_each_time(tmp_path) -> None:
    index = empty(tmp_path / "index")
    for text in ("one", "two"):
        reading, writing = os.pipe()
        os.write(writing, text.encode())
        os.close(writing)
        build(index, f"/dev/fd/{reading}")
        os.close(reading)
    assert texts(index) == ["one", "two"]


def test_a_folder_that_cannot_be_made_or_locked(tmp_path) -> None:
    with pytest.raises(DatastoreError, match="Cannot make the folder"):
        empty(Path("/dev/null/index"))
    index = empty(tmp_path / "index")
    (index.path / ".lock").unlink(missing_ok=True)
    (index.path / ".lock").mkdir()
    with pytest.raises(DatastoreError, match="Cannot lock"):
        build(index, lines(tmp_path, "a.jsonl", ["x"]))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b'{"x":' + b"[" * 100_000, b"\xff", b'{"key": 5}']
)
def test_a_journal_that_is_none_is_passed_over(tmp_path, content: bytes) -> None:
    index = empty(tmp_path / "index")
    (index.path / "journal.json").write_bytes(content)
    build(index, lines(tmp_path, "a.jsonl", ["one"]))
    assert texts(index) == ["one"]
