"""Tests of snapshots at a location that they are copied from."""

import logging
import uuid
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from retrieval_draft.errors import DatastoreError
from tests.support.snapshots import NOW, WARNED, count, opened, reseal, segment, state, tear_segment


class Remote:
    """A location in memory, and ways to damage what is there."""

    def __init__(self, tmp_path) -> None:
        self.url = f"memory://remote-{uuid.uuid4().hex}"
        self.files = fsspec.filesystem("memory")
        self.location = opened(self.url, tmp_path)

    def path(self, name: str, ending: str) -> str:
        return next(each for each in self.files.find(self.url) if name in each and each.endswith(ending))

    def copies(self, tmp_path) -> list[Path]:
        return sorted((tmp_path / "cache").rglob("snapshot-*"))


@pytest.fixture
def remote(tmp_path):
    made = Remote(tmp_path)
    made.location.write([segment([7, 8])], state(NOW, 1))
    return made


def test_an_upload_in_progress_is_used_once_it_is_whole(remote, tmp_path) -> None:
    name = remote.location.write([segment([5, 6])], state(NOW + 1, 2)).name
    log = remote.path(name, "log.json")
    content = remote.files.cat_file(log)
    remote.files.rm_file(log)
    assert remote.location.newest().state.entries == 1
    remote.files.pipe_file(log, content)
    assert remote.location.newest().state.entries == 2


def test_a_copy_that_differs_from_its_checksums_is_passed_over(remote, tmp_path, caplog) -> None:
    name = remote.location.write([segment([5, 6])], state(NOW + 1, 2)).name
    path = remote.path(name, "tokens.npy")
    content = remote.files.cat_file(path)
    remote.files.pipe_file(path, content[:-1] + bytes([content[-1] ^ 1]))
    with caplog.at_level(logging.WARNING, WARNED):
        assert remote.location.newest().state.entries == 1
    assert len(caplog.records) == 1
    remote.files.pipe_file(path, content)
    assert remote.location.newest().state.entries == 2


def test_a_damaged_copy_is_fetched_again(remote, tmp_path) -> None:
    remote.location.newest()
    tear_segment(remote.copies(tmp_path)[0])
    assert count(remote.location.newest(), 7, 8) == 1


def test_a_snapshot_is_copied_once_and_old_copies_go(remote, tmp_path, monkeypatch) -> None:
    remote.location.newest()
    with monkeypatch.context() as patch:
        patch.setattr(type(remote.files), "get_file", None)
        assert remote.location.newest().state.entries == 1
    remote.location.write([segment([5])], state(NOW + 1, 2))
    remote.location.prune(1)
    assert remote.location.newest().state.entries == 2
    assert len(remote.copies(tmp_path)) == 1


def test_prune_keeps_the_whole_one_beside_crashed_uploads(remote, tmp_path) -> None:
    for number in (1, 2):
        name = remote.location.write([segment([5])], state(NOW + number, number)).name
        remote.files.rm_file(remote.path(name, "log.json"))
    remote.location.prune(2)
    assert remote.location.newest().state.entries == 1


def test_an_upload_that_fails_leaves_nothing(remote, monkeypatch) -> None:
    before = remote.files.find(remote.url)
    put, calls = type(remote.files).put_file, []

    def fails(self, *rest, **named):
        calls.append(rest)
        if len(calls) == 3:
            raise ConnectionError("down")
        return put(self, *rest, **named)

    monkeypatch.setattr(type(remote.files), "put_file", fails)
    with pytest.raises(DatastoreError, match="down"):
        remote.location.write([segment([5])], state(NOW + 1, 2))
    assert remote.files.find(remote.url) == before


def test_a_location_that_goes_down_while_it_is_read(remote, monkeypatch) -> None:
    def down(*_, **__):
        raise ConnectionError("down")

    monkeypatch.setattr(type(remote.files), "get_file", down)
    with pytest.raises(DatastoreError, match="down"):
        remote.location.newest()


@pytest.mark.parametrize(
    "name",
    [
        "../" * 8 + "PLANTED",
        "segment-0123456789abcdef/../../../../../../PLANTED",
        "/PLANTED",
        "C:\\PLANTED",
        "a\0b/PLANTED",
        "sitecustomize.py/PLANTED",
        "x/y/z/PLANTED",
    ],
)
def test_what_the_manifest_does_not_name_is_not_fetched(remote, tmp_path, name) -> None:
    log = remote.path("snapshot-", "log.json")
    remote.files.store[f"{log.removesuffix('log.json')}{name}"] = remote.files.store[log]
    assert remote.location.newest().state.entries == 1
    assert not list(tmp_path.rglob("*PLANTED*"))
    ours = {"manifest.json", "log.json", "tokens.npy", "suffixes.npy", "documents.npy", "samples.npy"}
    assert {each.name for each in tmp_path.rglob("*") if each.is_file()} == ours


@pytest.mark.parametrize(
    "name", ["../../PLANTED", "/home/PLANTED", "segment-x", "segment-0123456789abcdef/..", ""]
)
def test_a_manifest_that_names_other_locations_is_passed_over(remote, tmp_path, name, caplog) -> None:
    folder = tmp_path / "made"
    made = opened(folder, tmp_path)
    info = made.write([segment([7, 8])], state(NOW + 5, 9))
    local = next(folder.glob("*/*/snapshot-*"))
    reseal(local, lambda manifest: manifest["segments"][0].update(name=name))
    target = remote.path("snapshot-", "log.json").rsplit("/", 2)[0] + "/" + info.name
    for path in local.rglob("*"):
        if path.is_file():
            remote.files.pipe_file(f"{target}/{path.relative_to(local).as_posix()}", path.read_bytes())
    with caplog.at_level(logging.WARNING, WARNED):
        assert remote.location.newest().state.entries == 1
    assert "hexadecimal digits" in caplog.text
    assert not list(tmp_path.rglob("PLANTED"))


def test_sizes_are_asked_before_bytes_are_fetched(remote, tmp_path, monkeypatch) -> None:
    remote.files.pipe_file(remote.path("snapshot-", "tokens.npy"), bytes(1 << 20))
    fetched = []
    get = type(remote.files).get_file
    monkeypatch.setattr(
        type(remote.files),
        "get_file",
        lambda self, path, *rest: (fetched.append(path), get(self, path, *rest)),
    )
    assert remote.location.newest() is None
    assert not any(path.endswith("tokens.npy") for path in fetched)


def test_a_state_without_end_is_not_read(remote, monkeypatch) -> None:
    monkeypatch.setattr("retrieval_draft.index.store.snapshots.MAX_STATE_BYTES", 10)
    assert remote.location.newest() is None
    assert remote.location.listing() == []


def test_a_snapshot_larger_than_the_disk_is_passed_over(remote, monkeypatch, caplog) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with caplog.at_level(logging.WARNING, WARNED):
        assert remote.location.newest() is None
    assert "are free" in caplog.text
