"""The matrix's file: kept over a restart, read in full or not at all, and never in the way."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from retrieval_draft._files import replace_file
from retrieval_draft.config import DraftConfig
from retrieval_draft.index import matrix_file
from retrieval_draft.index.adjacency import MATRIX, AdjacencyMatrix, AdjacencySource, make_source
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.matrix_file import matrix_bytes, merge_bytes
from retrieval_draft.index.source import NodeLogits
from tests.support.tokens import ids


def source(folder: Path, fingerprint: str = "f", **options: object) -> AdjacencySource:
    config = DraftConfig(history_folder=str(folder), adjacency_rows=64, **options)  # type: ignore[arg-type]
    return make_source(config, DraftStores(100, fingerprint))


def teach(made: AdjacencySource, following: int = 9) -> None:
    session = made.open(ids(1, 2, 3, 4))
    session.learn(
        NodeLogits(ids(1, 2, 3, 4)[None], ids(following, 8)[None], np.array([[0.6, 0.3]], np.float32))
    )
    session.close()


def drafts(made: AdjacencySource) -> list[int]:
    return made.open(ids(1, 2, 3, 4)).propose(2).tokens.tolist()


def test_rows_are_there_after_a_restart(tmp_path: Path) -> None:
    first = source(tmp_path / "made")
    teach(first)
    expected = first.matrix.propose(ids(1, 2, 3, 4), 8, first.matrix.workspace())
    first.close()
    second = source(tmp_path / "made")
    found = second.matrix.propose(ids(1, 2, 3, 4), 8, second.matrix.workspace())
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.probs, expected.probs)
    assert second.matrix.filled == first.matrix.filled == 4


@pytest.mark.parametrize("kept", ["history_prompts", "history_replies"])
def test_where_a_part_of_the_text_is_not_kept_rows_are_not(tmp_path: Path, kept: str) -> None:
    made = source(tmp_path, **{kept: False})
    teach(made)
    made.close()
    assert not (tmp_path / MATRIX).exists()


def test_a_torn_file_costs_that_file_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = source(tmp_path)
    teach(made)
    made.close()
    os.truncate(tmp_path / MATRIX, 100)
    again = source(tmp_path)
    assert "starts afresh" in caplog.text
    assert again.matrix.filled == 0
    teach(again)
    again.close()
    assert drafts(source(tmp_path)) == [9, 8]


def test_another_tokenizers_file_is_neither_read_nor_replaced(tmp_path: Path) -> None:
    made = source(tmp_path)
    teach(made)
    made.close()
    other = source(tmp_path, "g")
    assert other.matrix.filled == 0
    teach(other, 7)
    other.close()
    assert drafts(source(tmp_path)) == [9, 8]


def test_a_full_disk_loses_the_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    made = source(tmp_path)
    teach(made)
    monkeypatch.setattr(matrix_file, "replace_file", full)
    made.close()
    assert "could not be saved" in caplog.text


def test_a_request_has_it_saved_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = source(tmp_path)
    teach(made)
    assert not (tmp_path / MATRIX).exists()
    monkeypatch.setattr(matrix_file, "SAVE_SECONDS", 0.0)
    teach(made)
    made.flush()  # waits for the thread that saves
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(tmp_path / MATRIX, copy)
    assert drafts(source(copy)) == [9, 8]


def test_every_number_of_a_file_may_be_anything(tmp_path: Path) -> None:
    import msgspec

    made = AdjacencyMatrix(rows=64)
    made.learn(NodeLogits(ids(1, 2, 3, 4)[None], ids(9, 8)[None], np.array([[0.6, 0.3]], np.float32)))
    file = msgspec.msgpack.decode(matrix_bytes(made, "f"), type=matrix_file._File)
    hostile = {
        "keys": np.zeros(4, np.uint64),
        "visits": np.array([1, 1, -1, 1], np.int32),
        "times": np.array([1, 1, -5, 1], np.int32),
        "tokens": np.full(32, 1 << 30, np.int32),
        "probs": np.full(32, np.nan, np.float32),
        "ids": np.array([-4, 8], np.int32),
        "counts": np.array([np.inf, 1], np.float32),
    }
    for name, array in hostile.items():
        parts = {each: bytes(getattr(file, each)) for each in matrix_file._ARRAYS} | {name: array.tobytes()}
        views = {each: memoryview(part) for each, part in parts.items()}
        changed = msgspec.structs.replace(file, **views, xxh3=matrix_file._checksum(views))
        with pytest.raises(matrix_file.DatastoreError):
            merge_bytes(AdjacencyMatrix(rows=64), msgspec.msgpack.encode(changed), "f", 100)
    for other in ({"top_k": 0}, {"top_k": 1 << 40}, {"format_version": 9}, {"kind": "x"}):
        content = msgspec.msgpack.encode(msgspec.structs.replace(file, **other))
        with pytest.raises(matrix_file.DatastoreError):
            merge_bytes(AdjacencyMatrix(rows=64), content, "f", 100)
    replace_file(tmp_path / MATRIX, b"\x00")
    assert source(tmp_path).matrix.filled == 0


def test_what_was_learned_from_a_text_can_be_forgotten() -> None:
    made = AdjacencySource(rows=256)
    teach(made)
    session = made.open(ids(7, 7))
    session.learn(NodeLogits(ids(-1, 7, 7, 7)[None], ids(5)[None], np.ones((1, 1), np.float32)))
    assert made.matrix.forget(ids(1, 2, 3, 4)) == 4
    assert made.matrix.row(ids(4))[2] == 0
    assert made.matrix.row(ids(7))[0].tolist() == [5]
    assert len(made.matrix.rows()) == 3
