"""Tests of what stands beside a bad record: it is read, and the bad one is counted and named."""

import codecs
import json
import os
from pathlib import Path

import pytest

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.build import _formats
from retrieval_draft.index.build.documents import (
    DocumentFile,
    NoTextColumnError,
    ReadReport,
    find_files,
    read_documents,
)

GOOD = b'{"text": "good"}\n'
DEEP = b"[" * 100_000 + b"]" * 100_000


def read(path: Path, **options: str) -> tuple[list[str], ReadReport]:
    report = ReadReport()
    found = []
    for file in find_files([str(path)], report=report):
        found += [text for _, text in read_documents(file, report, **options)]
    return found, report


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "bad \\ud83d end"}', "half a surrogate pair"),
        (b'{"text": "\\udc00"}', "half a surrogate pair"),
        (b'{"text": "\\ude00\\ud83d"}', "half a surrogate pair"),
        (b'"\\ud800"', "half a surrogate pair"),
        (DEEP, "nested too deeply"),
        (b'{"text": "x", "more": ' + DEEP + b"}", "nested too deeply"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "nested too deeply"),
        (b'{"text": "caf\xe9"}', "broken line"),
        (b'{"text": "x\0"}', "broken line"),
        (b"\0" * 300, "broken line"),
        (b'{"text": "torn', "broken line"),
        (b"}{", "broken line"),
        (b"\xfd\xfe", "broken line"),
        (b'{"text": ""}', "empty"),
        (b'{"text": null}', "empty"),
        (b'{"text": []}', "empty"),
        (b'{"text": " \\n\\t"}', "empty"),
        (b'{"text": 5}', "no text column"),
        (b'{"text": NaN}', "no text column"),
        (b'{"text": true}', "no text column"),
        (b'{"text": {"a": 1}}', "no text column"),
        (b'{"text": [1, 2]}', "no text column"),
        (b'{"text": [["a"]]}', "no text column"),
        (b'{"other": "x"}', "no text column"),
        (b"5", "no text column"),
        (b"null", "no text column"),
        (b"[1, 2]", "no text column"),
        (b"1" * 10_000, "no text column"),
    ],
)
@pytest.mark.parametrize("before", [0, 1])
def test_a_bad_line_costs_that_line(tmp_path, line: bytes, why: str, before: int) -> None:
    if line == b"[1, 2]" and not before:
        pytest.skip("a list on the first line is the whole of a file's records")
    path = written(tmp_path / "a.jsonl", GOOD * before + line + b"\n" + GOOD * 2)
    found, report = read(path)
    assert found == ["good"] * (before + 2)
    assert report.reasons == {why: 1}
    assert report.named == [f"{path}, line {before + 1}: {why}"]


@pytest.mark.parametrize(
    "record",
    [
        b'{"text": "good", "score": NaN, "least": -Infinity}',
        b'{"text": "good", "id": ' + b"9" * 10_000 + b"}",
        b'{"text": "old", "text": "good"}',
        b'{"text": ["good", null]}',
        b'{"text": [{"role": "user", "content": "good"}, {"role": "assistant", "content": null}]}',
        b'  {"text": "good"}  ',
        b'{"text": "good"}\r',
    ],
)
def test_odd_records_are_good_ones(tmp_path, record: bytes) -> None:
    found, report = read(written(tmp_path / "a.jsonl", GOOD + record + b"\n" + GOOD))
    assert (found, report.skipped) == (["good"] * 3, 0)
    assert read(written(tmp_path / "b.jsonl", record))[0] == ["good"]


def test_records_of_an_array(tmp_path) -> None:
    records = b'[{"text": "one"}, {"text": "bad \\udc00"}, {"no": 1}, 7, null, "two", {"text": null}]'
    path = written(tmp_path / "a.json", records)
    found, report = read(path)
    assert found == ["one", "two"]
    assert report.reasons == {"half a surrogate pair": 1, "no text column": 3, "empty": 1}
    assert f"{path}, record 1: half a surrogate pair" in report.named


def test_a_broken_first_line_leaves_the_others(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_formats, "LINE_BYTES", 1000)
    found, report = read(written(tmp_path / "a.jsonl", b"{broken\n" + GOOD * 500))
    assert found == ["good"] * 500
    assert report.reasons == {"broken line": 1}


@pytest.mark.parametrize("mark", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-8"])
def test_records_in_other_encodings(tmp_path, mark: str) -> None:
    path = written(tmp_path / "a.jsonl", ('\ufeff{"text": "drei äöü"}\n{"text": "漢字"}\n').encode(mark))
    assert read(path)[0] == ["drei äöü", "漢字"]
    path = written(tmp_path / "a.txt", "\ufeffall of\nit ä".encode(mark))
    assert read(path)[0] == ["all of\nit ä"]


def test_half_a_pair_in_utf_16_costs_its_line(tmp_path) -> None:
    text = "one\n" * 5 + "\ud83d bad\n" + "two\n" * 5
    path = written(tmp_path / "a.txt", codecs.BOM_UTF16_LE + text.encode("utf-16-le", "surrogatepass"))
    found, report = read(path)
    assert found == ["one\n" * 5 + "two\n" * 5]
    assert report.named == [f"{path}, line 6: not UTF-8"]


def test_a_line_of_text_that_is_not_utf_8_costs_that_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_formats, "BLOCK", 64)
    lines = [f"line {number} ä".encode() for number in range(100)]
    lines[50] = lines[70] = b"caf\xe9 here"
    path = written(tmp_path / "a.txt", b"\n".join(lines))
    found, report = read(path)
    assert "".join(found) == "".join(f"line {n} ä\n" for n in range(100) if n not in (50, 70))[:-1]
    assert report.named == [f"{path}, line 51: not UTF-8", f"{path}, line 71: not UTF-8"]


def test_text_ends_where_something_else_begins(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_formats, "BLOCK", 64)
    found, report = read(written(tmp_path / "a.txt", b"good line\n" * 30 + bytes(range(128, 255)) * 99))
    assert found == ["good line\n" * 30]
    assert report.reasons == {"not UTF-8": 2}  # the line it begins with, and the rest


def test_nul_costs_its_line_and_not_the_file(tmp_path, monkeypatch) -> None:
    path = written(tmp_path / "a.txt", b"one\ntwo\0\n" + b"three\n" * 5)
    found, report = read(path)
    assert found == ["one\n" + "three\n" * 5]
    assert report.named == [f"{path}, line 2: binary"]
    monkeypatch.setattr(_formats, "BLOCK", 64)  # a log whose end a crash left as zeros
    found, report = read(written(tmp_path / "b.txt", b"a good line\n" * 1000 + b"\0" * 5000))
    assert found == ["a good line\n" * 1000]
    assert report.reasons.keys() == {"binary"}
    found, report = read(written(tmp_path / "c.txt", b"MZ\0\1\nx\0"))
    assert (found, report.reasons) == ([], {"binary": 1})


@pytest.mark.parametrize(
    "content",
    ['{\n  // a comment\n  "a": 1,\n}\n', '[{"text": "x"}, {"te', "{ a: 1 }", '[\n  {"a": 1},\n  {"b"'],
)
def test_json_that_is_none_is_text(tmp_path, content: str) -> None:
    found, report = read(written(tmp_path / "tsconfig.json", content.encode()))
    assert (found, report.skipped) == ([content], 0)


def test_long_lines_and_letters_across_blocks(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_formats, "BLOCK", 7)
    monkeypatch.setattr(_formats, "DOCUMENT_CHARACTERS", 50)
    for text in ("漢字" * 99, "é" * 99 + "\n" + "🎈" * 99, "\n" * 99 + "x"):
        found, report = read(written(tmp_path / "a.txt", text.encode()))
        assert "".join(found) == (text if text.strip() != "x" else found[-1])
        assert "not UTF-8" not in report.reasons


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "a.arrow", "a.txt.gz", "A.JSONL"]
)
def test_empty_files_are_named(tmp_path, name: str) -> None:
    if name.endswith(("t", "w")) and name != "a.txt":
        pytest.importorskip("pyarrow")
    found, report = read(written(tmp_path / name, b""))
    assert found == []
    assert report.skipped == 1


@pytest.mark.parametrize(
    "content", [b'{"type":"module"}', b'{"type": "module"}\n\n', b"[1, 2]\n", b'{\n"a": 1\n}']
)
def test_json_that_holds_no_records_is_text(tmp_path, content: bytes) -> None:
    found, report = read(written(tmp_path / "package.json", content))
    assert [json.loads(text) for text in found] == [json.loads(content)]
    assert report.skipped == 0


def test_records_without_the_field_name_those_they_have(tmp_path) -> None:
    path = written(tmp_path / "a.jsonl", b'{"body": "x"}\n' * 2000 + GOOD)
    with pytest.raises(NoTextColumnError, match="'body'"):
        read(path)
    assert read(path, text_column="body")[0] == ["x"] * 2000


def arrow_table(values: object, name: str = "text"):
    arrow = pytest.importorskip("pyarrow")
    return arrow.table([values], names=[name])


def write_table(path: Path, table: object) -> Path:
    import pyarrow
    from pyarrow import parquet

    if path.suffix.lower() == ".parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    return path


formats = pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "A.PARQUET"])


@formats
@pytest.mark.parametrize("large", [False, True])
def test_a_value_that_is_not_utf_8_costs_that_value(tmp_path, name: str, large: bool) -> None:
    arrow = pytest.importorskip("pyarrow")
    kind = arrow.large_binary() if large else arrow.binary()
    values = arrow.array([b"good", b"caf\xe9", None, b"fine", b""], kind)
    text = arrow.large_string() if large else arrow.string()
    for column in (values, arrow.Array.from_buffers(text, len(values), values.buffers())):
        path = write_table(tmp_path / name, arrow_table(column))
        found, report = read(path)
        assert found == ["good", "fine"]
        assert report.reasons == {"not UTF-8": 1, "empty": 2}
        assert f"{path}, row 1: not UTF-8" in report.named


@formats
def test_columns_that_hold_no_text(tmp_path, name: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    for values in ([1, 2], [1.5, float("nan")], [[["a"]], [["b"]]], [True, False], [{"a": 1}, {"a": 2}]):
        path = write_table(tmp_path / name, arrow_table(arrow.array(values)))
        with pytest.raises(NoTextColumnError, match="no field 'text' with text; it has 'text'"):
            read(path)
    path = write_table(tmp_path / name, arrow_table(arrow.array([[], ["a", "b"], ["c", None]])))
    assert read(path)[0] == ["a\nb", "c"]


@formats
def test_two_columns_of_one_name(tmp_path, name: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table([arrow.array(["x"]), arrow.array(["y"])], names=["text", "text"])
    assert read(write_table(tmp_path / name, table))[0] == ["x"]


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_torn_arrow_stream_keeps_what_came_before(tmp_path, kept: float) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow_table(arrow.array([f"text {number}" for number in range(1000)]))
    path = tmp_path / "a.arrow"
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=10)
    content = path.read_bytes()
    found, report = read(written(path, content[: int(kept * len(content))]))
    assert found == [f"text {number}" for number in range(len(found))]
    assert len(found) > kept * 1000 - 30
    assert report.reasons == {"torn": 1}


def test_folders_hold_what_is_no_file(tmp_path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    written(tree / "a.txt", b"good")
    os.mkfifo(tree / "pipe.txt")
    (tree / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tree / "itself").symlink_to(tree / "itself")
    (tree / "loop").symlink_to(tree)
    (tree / "null").symlink_to("/dev/null")
    os.mkfifo(tree / "manifest.json")
    found, report = read(tree)
    assert found == ["good"]
    assert report.reasons == {"no regular file": 3, "unreadable": 2}
    report = ReadReport()
    assert len(find_files([f"{tree}/*.txt"], report=report)) == 1  # a glob waits for no pipe either
    assert report.skipped == 2


def test_names_that_are_no_text(tmp_path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jsonl")  # noqa: PTH118
    with open(path, "wb") as file:  # noqa: PTH123
        file.write(GOOD + b"broken\n")
    found, report = read(tmp_path)
    assert found == ["good"]
    report.named[0].encode()  # can be printed and kept
    assert "line 2: broken line" in report.named[0]


def test_deep_trees(tmp_path) -> None:
    where = tmp_path
    for _ in range(60):
        where /= "d" * 20
        where.mkdir()
        written(where / "a.txt", b"good")
    assert len(read(tmp_path)[0]) == 60


def test_what_changes_between_finding_and_reading(tmp_path) -> None:
    path = written(tmp_path / "a.txt", b"text" * 1000)
    [file] = find_files([str(path)])
    for change, why in (
        (lambda: written(path, b"te"), None),
        (path.unlink, "unreadable"),
        (lambda: os.mkfifo(path), "no regular file"),
        (lambda: (path.unlink(), path.mkdir()), "no regular file"),
    ):
        change()
        report = ReadReport()
        found = [text for _, text in read_documents(file, report)]
        assert found == ([] if why else ["te"])
        assert report.reasons == ({why: 1} if why else {})


def test_a_pipe_is_read(tmp_path) -> None:
    reading, writing = os.pipe()
    os.write(writing, GOOD * 2)
    os.close(writing)
    [file] = find_files([f"/dev/fd/{reading}"])
    assert file.is_stream
    assert [text for _, text in read_documents(file, ReadReport())] == ["good", "good"]
    os.close(reading)


def saved_dataset(folder: Path, shards: list[object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"_data_files": shards}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_dataset_names_nothing_outside_its_folder(tmp_path) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow_table(arrow.array(["good"]))
    write_table(tmp_path / "secret.arrow", table)
    names = [
        "../secret.arrow",
        str(tmp_path / "secret.arrow"),
        "..",
        "",
        ".",
        5,
        None,
        "a.arrow",
        "gone.arrow",
    ]
    folder = saved_dataset(tmp_path / "data", [{"filename": name} for name in names] + ["x", None])
    write_table(folder / "a.arrow", table)
    found, report = read(folder)
    assert found == ["good"]
    assert report.reasons == {"not in its folder": 9, "unreadable": 1}
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "loop").symlink_to(tmp_path / "splits")
    saved_dataset(tmp_path / "splits" / "train", [{"filename": "a.arrow"}])
    write_table(tmp_path / "splits" / "train" / "a.arrow", table)
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": [".", "../data", "loop", "train"]}')
    found, report = read(tmp_path / "splits")
    assert found == ["good"]
    assert report.reasons == {"not in its folder": 2}


def test_reports_of_everything_left_out_are_told(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInputError, match=r"Left out: .*pipe: no regular file"):
        find_files([str(tmp_path)])


def test_files_by_kind(tmp_path) -> None:
    for name, kind in (
        ("A.JSONL.GZ", "jsonl"),
        ("a.Json", "json"),
        ("a.ndjson.XZ", "jsonl"),
        ("a.PARQUET", "parquet"),
        ("a.csv", "text"),
        ("parquet", "text"),
        (".jsonl", "text"),
    ):
        [file] = find_files([str(written(tmp_path / name, b"x"))])
        assert file.kind == kind
    assert DocumentFile("-", "text", 0, is_stream=True).is_stream
