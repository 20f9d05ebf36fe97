"""Tests of finding and reading documents."""

import gzip
import io
import json
import os
import sys
from pathlib import Path

import pytest

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.build import _formats
from retrieval_draft.index.build.documents import DocumentFile, ReadReport, find_files, read_documents
from retrieval_draft.index.segments.index_folder import IndexFolder

RECORDS = [{"text": "one", "id": 1}, {"text": "two\nlines"}, {"text": "drei äöü"}]
TEXTS = ["one", "two\nlines", "drei äöü"]


def read(path: Path | str, report: ReadReport | None = None, **options) -> list[str]:
    found = []
    for file in find_files([str(path)]):
        found += [text for _, text in read_documents(file, report or ReadReport(), **options)]
    return found


def json_lines(records: list[object] = RECORDS) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def table():
    arrow = pytest.importorskip("pyarrow")
    return arrow.table({"text": TEXTS, "id": [1, 2, 3]})


def write(path: Path, content: bytes) -> Path:
    if path.name.endswith(".gz"):
        content = gzip.compress(content)
    elif path.name.endswith(".zst"):
        content = pytest.importorskip("zstandard").compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_json_lines(tmp_path, packed: str) -> None:
    assert read(write(tmp_path / f"a.jsonl{packed}", json_lines())) == TEXTS


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_plain_text(tmp_path, packed: str) -> None:
    assert read(write(tmp_path / f"a.txt{packed}", b"\xef\xbb\xbfall of\nit \xc3\xa4")) == ["all of\nit ä"]


def test_parquet(tmp_path) -> None:
    made = table()
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(made, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == TEXTS
    with pytest.raises(InvalidInputError, match="'text', 'id'"):
        read(tmp_path / "a.parquet", text_column="body")


@pytest.mark.parametrize("split", [False, True])
def test_a_saved_dataset(tmp_path, split: bool) -> None:
    made = table()
    import pyarrow

    folder = tmp_path / "data" / "train" if split else tmp_path / "data"
    folder.mkdir(parents=True)
    with pyarrow.ipc.new_stream(folder / "data-00000.arrow", made.schema) as writer:
        writer.write_table(made)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    if split:
        (tmp_path / "data" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    assert read(tmp_path / "data") == TEXTS


@pytest.mark.parametrize(("content", "expected"), [(json_lines(), TEXTS), (b"no {json}\n", ["no {json}\n"])])
def test_stdin(monkeypatch, content: bytes, expected: list[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert read("-") == expected


@pytest.mark.parametrize("name", ["a.jsonl", "b.txt"])
def test_reading_goes_on_behind_the_nth_document(tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.setattr(_formats, "DOCUMENT_CHARACTERS", 10)
    records: list[object] = [*RECORDS, {"text": " "}, {"no": 1}, {"text": "last"}]
    content = json_lines(records) if name.endswith("l") else b"line of text\n" * 9
    [file] = find_files([str(write(tmp_path / name, content))])
    every = list(read_documents(file, ReadReport()))
    assert [number for number, _ in every] == list(range(len(every)))
    for start in range(len(every) + 1):
        assert list(read_documents(file, ReadReport(), start=start)) == every[start:]


def test_long_texts_are_cut_behind_a_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_formats, "DOCUMENT_CHARACTERS", 20)
    text = "short\n" * 10 + "x" * 55 + "\nend"
    found = read(write(tmp_path / "a.txt", text.encode()))
    assert "".join(found) == text
    assert max(map(len, found)) <= 20
    assert found[0].endswith("\n")


def test_fields_within_fields_and_messages(tmp_path) -> None:
    records: list[object] = [
        {"data": {"text": "inner"}},
        {"data": {"text": ["a", "b"]}},
        {"data": {"text": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}},
    ]
    path = write(tmp_path / "a.jsonl", json_lines(records))
    assert read(path, text_column="data.text") == ["inner", "a\nb", "hi\nho"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (json.dumps(RECORDS).encode(), TEXTS),
        (json.dumps(RECORDS, indent=2).encode(), TEXTS),
        (b'{\n "name": "config"\n}\n', ['{\n  "name": "config"\n}']),
        (b'"a text"\n"another"\n', ["a text", "another"]),
    ],
)
def test_json_that_is_not_lines(tmp_path, content: bytes, expected: list[str]) -> None:
    assert read(write(tmp_path / "a.json", content)) == expected


def test_what_cannot_be_read_is_counted_and_named(tmp_path) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "binary.bin").write_bytes(b"MZ\0\1")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(b"some text " * 5000)[:-20])
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    write(tmp_path / "lines.jsonl", json_lines([*RECORDS[:1], {"other": 1}]) + b"{broken\n")
    report = ReadReport()
    found = read(tmp_path, report)
    assert "x = 1\n" in found
    assert "caf" in found  # what came before stays
    assert "one" in found
    assert report.reasons["binary"] == 1
    assert report.reasons["not UTF-8"] == 1
    assert report.reasons["empty"] == 1
    assert report.reasons["torn"] == 1
    assert report.reasons["no text column"] == 1
    assert report.reasons["broken line"] == 1
    assert report.skipped == 6
    assert any(name.endswith("lines.jsonl, line 3: broken line") for name in report.named)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path) -> None:
    path = write(tmp_path / "a.txt", b"text")
    path.chmod(0)
    report = ReadReport()
    assert read(path, report) == []
    assert report.reasons == {"unreadable": 1}


def test_a_file_that_vanished() -> None:
    report = ReadReport()
    assert list(read_documents(DocumentFile("/no/such/file", "text", 3), report)) == []
    assert report.reasons == {"unreadable": 1}


def test_torn_tables(tmp_path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense PAR1")
    report = ReadReport()
    assert read(tmp_path, report) == []
    assert report.reasons == {"torn": 1}


def test_a_field_that_no_record_has(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines([{"body": "x", "title": "y"}]))
    with pytest.raises(InvalidInputError, match="'body', 'title'"):
        read(path)


def test_lines_that_are_too_long(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_formats, "LINE_BYTES", 50)
    report = ReadReport()
    path = write(tmp_path / "a.jsonl", json_lines([{"text": "x" * 100}, {"text": "short"}]))
    assert read(path, report) == ["short"]
    assert report.reasons == {"line too long": 1}


def names(folder: Path, *paths: str, **options) -> list[str]:
    return [Path(file.path).relative_to(folder).as_posix() for file in find_files(paths, **options)]


def test_folders_are_walked_in_one_order(tmp_path) -> None:
    for name in (
        "b/two.py",
        "a/one.py",
        "a/.hidden",
        ".git/config",
        "a/__pycache__/x.pyc",
        "z.txt",
        "b/n.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    IndexFolder.create(tmp_path / "b" / "index", "f", 10)
    where = str(tmp_path)
    assert names(tmp_path, where) == ["z.txt", "a/one.py", "b/n.md", "b/two.py"]
    assert names(tmp_path, where, include=["*.py"]) == ["a/one.py", "b/two.py"]
    assert names(tmp_path, where, include=["**/*.py"], exclude=["a/**"]) == ["b/two.py"]
    assert names(tmp_path, where, exclude=["*.md", "a"]) == ["z.txt", "b/two.py"]
    assert names(tmp_path, f"{where}/**/*.py") == ["a/one.py", "b/two.py"]
    assert names(tmp_path, f"{where}/z.txt", where)[0] == "z.txt"  # once, where it is named first
    assert len(names(tmp_path, f"{where}/z.txt", where)) == 4


def test_nothing_to_read(tmp_path) -> None:
    with pytest.raises(InvalidInputError, match="no /no/such"):
        find_files(["/no/such"])
    with pytest.raises(InvalidInputError, match="no file to read"):
        find_files([str(tmp_path)])


def test_reports_add_up() -> None:
    one, two = ReadReport(1, 10), ReadReport(2, 5)
    one.skip("a", "binary")
    two.skip("b", "empty")
    one.merge(two)
    assert (one.documents, one.characters, one.skipped, one.named) == (3, 15, 2, ["a: binary", "b: empty"])
