"""Files that say what cannot be: opened right or refused by name, and no memory read that is not theirs."""

from __future__ import annotations

import copy
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from retrieval_draft._files import file_checksum
from retrieval_draft.errors import DatastoreError, RetrievalDraftError
from retrieval_draft.index.build.journal import Journal
from retrieval_draft.index.corpus import Corpus, CorpusSource
from retrieval_draft.index.segments.describe import describe
from retrieval_draft.index.segments.index_folder import IndexFolder, Manifest, _own_checksum
from retrieval_draft.index.segments.segment import Segment

ABSENT = object()
ODD: list[Any] = [
    ABSENT, None, -1, 0, 1, 5, 2**31, 2**62, -(2**62), 2**64, 10**30, 0.5, 1e300, True, "", "x", "../..",
    "/etc", "a/b", "C:\\x", "\0", "segment-0000000000000000", "x" * 10_000, [], [-1], {}, {"x": {}}, [[]],
    {"a": None},
]  # fmt: skip
"""Values that may stand in the place of any field."""


def fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field of a document, those within others included."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inside:
        yield (*path, name)
        yield from fields(each, (*path, name))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    made = copy.deepcopy(document)
    parent = made
    for name in path[:-1]:
        parent = parent[name]
    if value is ABSENT:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    index = IndexFolder.create(tmp_path / "index", "f" * 32, 1000)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 50, 40).astype(np.int32) for _ in range(20)]
    index.publish([index.write(Segment.build(texts, 1000)), index.write(Segment.build(texts[:2], 1000))])
    return index.path


def seal(folder: Path, manifest: Any) -> None:
    """Writes a manifest with checksums that are right, as whoever may write the folder can."""
    for entry in IndexFolder.open(folder).manifest.segments:
        for name in entry.files:
            path = folder / entry.name / name
            for mine in manifest["segments"] if isinstance(manifest.get("segments"), list) else ():
                if isinstance(mine, dict) and mine.get("name") == entry.name and path.is_file():
                    mine["files"][name] = {"bytes": path.stat().st_size, "xxh3": file_checksum(path)}
    write(folder, manifest)


def write(folder: Path, manifest: Any) -> None:
    try:
        made = msgspec.convert(manifest, Manifest)
        made.xxh3 = _own_checksum(made)
        content = msgspec.json.encode(made)
    except (msgspec.ValidationError, msgspec.EncodeError, OverflowError):
        content = msgspec.json.encode(_json(manifest))
    (folder / "manifest.json").write_bytes(content)


def _json(value: Any) -> Any:
    """As msgspec writes it: integers beyond 64 bits go as text does."""
    if isinstance(value, dict):
        return {name: _json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_json(each) for each in value]
    is_large = isinstance(value, int) and not -(2**63) <= value < 2**64
    return msgspec.Raw(str(value).encode()) if is_large else value


def use(folder: Path) -> bool:
    """Opens an index and does all that can be done with one. False where it is refused."""
    try:
        corpus = Corpus.open(folder)
    except RetrievalDraftError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert folder.name in refused.message
        return False
    corpus.folder.verify()
    rng = np.random.default_rng(1)
    for _ in range(2):
        session = CorpusSource([corpus]).open(rng.integers(0, 60, 40).astype(np.int32))
        session.propose(24)
        session.observe(rng.integers(0, 60, 3).astype(np.int32))
        assert len(session.propose(24)) <= 24
    for segment in corpus.segments:
        for length in (1, 2, 5):
            segment.followers(rng.integers(0, 50, length).astype(np.int32))
    describe(corpus.segments, 10)
    try:
        for segment in corpus.segments:
            texts = segment.texts(corpus.folder.manifest.vocabulary_size)
            Segment.join(np.array(texts), np.array(segment.documents), corpus.folder.manifest.vocabulary_size)
    except RetrievalDraftError:
        pass
    return True


def test_every_field_of_a_manifest_may_say_anything(folder: Path) -> None:
    manifest = msgspec.json.decode((folder / "manifest.json").read_bytes())
    opened = 0
    for path in fields(manifest):
        for value in ODD:
            write(folder, changed(manifest, path, value))
            opened += use(folder)
    assert opened  # names of tokenizers and the like may be anything
    write(folder, manifest)
    assert use(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"[", b"[" * 100_000, b'"\xff"', b"\xff\xfe", b"null", b"1" * 5000, b"{}", b'{"kind": []}'],
)
def test_what_is_no_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    assert not use(folder)


def test_a_manifest_that_is_no_file_or_has_no_end_is_refused(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("retrieval_draft.index.segments.index_folder.MAX_MANIFEST_BYTES", 100)
    assert not use(folder)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    assert not use(folder)


def npy(array: np.ndarray, **header: Any) -> bytes:
    """A .npy file; `header` says something else of its array than is true."""
    file = io.BytesIO()
    if not header:
        np.save(file, array, allow_pickle=True)
        return file.getvalue()
    truth = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(file, truth | header)
    return file.getvalue() + array.tobytes()


def zipped(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


LIES = {
    "objects": lambda a: npy(np.array([{}, "x"], object)),
    "floats": lambda a: npy(a.astype(np.float64)),
    "bytes": lambda a: npy(a.astype(np.uint8)),
    "the other byte order": lambda a: npy(a.astype(a.dtype.newbyteorder(">"))),
    "two axes": lambda a: npy(a.reshape(-1, 1)),
    "no axis": lambda a: npy(np.array(7, a.dtype)),
    "nothing": lambda a: npy(a[:0]),
    "one less": lambda a: npy(a[:-1]),
    "one more": lambda a: npy(np.append(a, a[:1])),
    "far more": lambda a: npy(np.repeat(a, 5000)),
    "a longer shape": lambda a: npy(a, shape=(len(a) + 1000,)),
    "a huge shape": lambda a: npy(a, shape=(2**62,)),
    "a negative shape": lambda a: npy(a, shape=(-1,)),
    "structures": lambda a: npy(a, descr=[("x", "<i2"), ("y", "<i2")]),
    "another type by its header": lambda a: npy(a, descr="<f4"),
    "a zip": zipped,
    "no array": lambda a: b"hello",
    "no bytes": lambda a: b"",
    "the least": lambda a: npy(np.full_like(a, np.iinfo(a.dtype).min)),
    "the most": lambda a: npy(np.full_like(a, np.iinfo(a.dtype).max)),
    "anything": lambda a: npy(np.frombuffer(np.random.default_rng(0).bytes(a.nbytes), a.dtype)),
    "backwards": lambda a: npy(a[::-1].copy()),
    "one value": lambda a: npy(np.full_like(a, a[len(a) // 2])),
}


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's own, of a huge shape
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", ["tokens", "suffixes", "documents", "samples"])
def test_arrays_may_hold_anything(folder: Path, name: str, lie: str) -> None:
    manifest = msgspec.json.decode((folder / "manifest.json").read_bytes())
    path = folder / manifest["segments"][0]["name"] / f"{name}.npy"
    content = LIES[lie](np.load(path))
    path.unlink()  # what is mapped stays
    path.write_bytes(content)
    seal(folder, manifest)
    use(folder)


@pytest.mark.parametrize("vocabulary", [2, 999, 1001, 2**16, 2**31 - 1])
def test_another_vocabulary_than_the_texts_have(folder: Path, vocabulary: int) -> None:
    manifest = msgspec.json.decode((folder / "manifest.json").read_bytes())
    manifest["vocabulary_size"] = vocabulary
    for entry in manifest["segments"]:
        entry["separator"] = vocabulary
    seal(folder, manifest)
    use(folder)


def test_a_journal_may_say_anything(folder: Path) -> None:
    index = IndexFolder.open(folder)
    entry = index.manifest.segments[0]
    texts, documents = np.array([1, 2, 1000], np.uint16), np.array([0], np.int32)
    run = index.write_run(texts, documents)
    journal = Journal(key="k", base=[], runs=[run], segments=[entry], shards={0: [entry]})
    document = msgspec.json.decode(msgspec.json.encode(journal))
    for path in fields(document):
        for value in ODD:
            (folder / "journal.json").write_bytes(msgspec.json.encode(_json(changed(document, path, value))))
            found = Journal.load(folder, "k", [], index.manifest)
            for each in (*found.segments, *found.runs):
                try:
                    if hasattr(each, "bits"):
                        index.open_segment(each)
                    else:
                        index.read_run(each)
                except DatastoreError:
                    pass


def test_a_run_is_held_to_what_was_written(folder: Path) -> None:
    index = IndexFolder.open(folder)
    run = index.write_run(np.array([1, 2, 1000], np.uint16), np.array([0], np.int32))
    assert index.read_run(run)[0].tolist() == [1, 2, 1000]
    for bad in (
        np.array([1, 2, 1000], np.int64),
        np.array([1, 2], np.uint16),
        np.array([[1, 2, 1000]], np.uint16),
    ):
        np.save(folder / run.name / "tokens.npy", bad)
        with pytest.raises(DatastoreError, match=run.name):
            index.read_run(run)
    shutil.rmtree(folder / run.name)
    with pytest.raises(DatastoreError, match="cannot be read"):
        index.read_run(run)
