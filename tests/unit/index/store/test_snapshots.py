"""Tests of snapshots of the shared log."""

import builtins
import json
import logging
import os
import shutil
import threading
import time
import traceback
import uuid
from pathlib import Path

import fsspec
import pytest

from retrieval_draft.errors import DatastoreError, InvalidInputError
from retrieval_draft.index.segments import segment as segment_module
from retrieval_draft.index.segments.index_folder import IndexFolder
from retrieval_draft.index.store.snapshots import SnapshotPlace
from tests.support.snapshots import (
    FINGERPRINT,
    NAMESPACE,
    NOW,
    WARNED,
    count,
    opened,
    reseal,
    segment,
    state,
    tear_segment,
)


@pytest.fixture(params=["local", "file", "memory"])
def where(request, tmp_path):
    if request.param == "memory":
        url = f"memory://snapshots-{uuid.uuid4().hex}"
        yield url
        memory = fsspec.filesystem("memory")
        if memory.exists(url):
            memory.rm(url, recursive=True)
    else:
        yield f"file://{tmp_path}/snapshots" if request.param == "file" else tmp_path / "snapshots"


def root(tmp_path) -> Path:
    return tmp_path / "snapshots" / FINGERPRINT / "default"


def three(tmp_path) -> tuple[SnapshotPlace, list[Path]]:
    """A location with three snapshots, and their folders, oldest first."""
    location = opened(tmp_path / "snapshots", tmp_path)
    for number in range(3):
        location.write([segment([7, 8, number])], state(NOW + number, number))
    return location, sorted(root(tmp_path).glob("snapshot-*"))


def test_what_was_written_is_found(where, tmp_path) -> None:
    location = opened(where, tmp_path)
    assert location.newest() is None
    assert location.listing() == []
    written = location.write([segment([7, 8, 9, 4]), segment(), segment([7, 8], [1])], state())
    found = opened(where, tmp_path).newest()
    assert found.state == state()
    assert found.info == written == location.listing()[0]
    assert (written.tokens, written.entries, written.created) == (7, 3, NOW)
    assert [each.num_tokens for each in found.segments] == [4, 0, 3]
    assert count(found, 7, 8) == 2


def test_a_snapshot_of_nothing(where, tmp_path) -> None:
    location = opened(where, tmp_path)
    location.write([], state(entries=0))
    assert location.newest().segments == ()


def test_the_newest_is_found_and_what_is_mapped_can_be_written_again(where, tmp_path) -> None:
    location = opened(where, tmp_path)
    location.write([segment([1, 2])], state(NOW + 5, 5))
    location.write([segment([3, 4])], state(NOW, 9))
    found = location.newest()
    assert found.state.entries == 5
    location.write([*found.segments, segment([1, 2, 3])], state(NOW + 9, 7))
    assert count(location.newest(), 1, 2) == 2
    assert [each.entries for each in location.listing()] == [7, 5, 9]


def test_an_index_is_in_it(tmp_path) -> None:
    _, folders = three(tmp_path)
    index = IndexFolder.open(folders[-1])
    assert index.manifest.fingerprint == FINGERPRINT
    assert index.verify() == []


def tear_log(folder: Path) -> None:
    log = folder / "log.json"
    log.write_bytes(log.read_bytes()[:-20])


def alter_log(folder: Path) -> None:
    log = folder / "log.json"
    log.write_bytes(log.read_bytes().replace(b"1763-5", b"1763-6"))


def remove_log(folder: Path) -> None:
    (folder / "log.json").unlink()


def remove_segment(folder: Path) -> None:
    shutil.rmtree(next(folder.glob("segment-*")))


def alter_manifest(folder: Path) -> None:
    index = IndexFolder.open(folder)  # a manifest that is whole, but not the one of this snapshot
    index.publish([])


def tear_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def other_format(folder: Path) -> None:
    log = folder / "log.json"
    content = json.loads(log.read_bytes())
    content["format_version"] = 2
    log.write_text(json.dumps(content))


def other_content(folder: Path) -> None:
    (folder / "log.json").write_text("[]")


BREAKS = [
    tear_log,
    alter_log,
    remove_log,
    tear_segment,
    remove_segment,
    alter_manifest,
    tear_manifest,
    other_format,
    other_content,
]


@pytest.mark.parametrize("damage", BREAKS)
def test_a_damaged_snapshot_is_passed_over(damage, tmp_path, caplog) -> None:
    location, folders = three(tmp_path)
    damage(folders[-1])
    with caplog.at_level(logging.WARNING, WARNED):
        assert location.newest().state.entries == 1
    assert [folders[-1].name in each.getMessage() for each in caplog.records] == [True]


LIES = [
    ("entries", -1), ("entries", 2**63), ("created", -1), ("created", 10**13), ("digest", "g" * 16),
    ("digest", ""),
    ("positions", {"4": "1-0"}), ("positions", {"../x": "1-0"}), ("positions", {"0": "1-x"}),
    ("positions", {"0": f"{2**64}-0"}), ("positions", {"0": "-5-0"}), ("positions", {"0": ""}),
    ("writers", {"zz": [0, 1]}), ("writers", {"ab" * 17: [0, 1]}), ("writers", {"ab": [0]}),
    ("writers", {"ab": [5, 1]}), ("writers", {"ab": [-1, 1]}), ("writers", {"ab": [0, 2**63]}),
    ("writers", {"ab": [0, 5, 3, 9]}), ("writers", {"ab": list(range(0, 9000, 2))}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), LIES)
def test_a_state_that_cannot_be_is_passed_over(name, value, tmp_path, caplog) -> None:
    location, folders = three(tmp_path)
    reseal(folders[-1], log=lambda file: file["state"].update({name: value}))
    with caplog.at_level(logging.WARNING, WARNED):
        assert location.newest().state.entries == 1
    assert "allowed is" in caplog.text


def test_no_field_of_a_state_costs_more_than_its_snapshot(tmp_path) -> None:
    location, folders = three(tmp_path)
    log = folders[-1] / "log.json"
    document = json.loads(log.read_bytes())
    odd = [None, -1, 2**62, 10**30, 0.5, True, "", "../..", "\0", [], {}, {"x": {}}]
    for where in (document, document["state"]):
        for name in list(where):
            kept = where[name]
            for value in odd:
                where[name] = value
                log.write_text(json.dumps(document))
                assert location.newest() is not None
                assert len(location.listing()) >= 2
            where[name] = kept
    for content in (b"", b"[" * 100_000, b"\xff", b'"\xff"', b"null"):
        log.write_bytes(content)
        assert location.newest().state.entries == 1


def test_links_are_no_part_of_a_snapshot(tmp_path) -> None:
    location, folders = three(tmp_path)
    path = next(folders[-1].glob("segment-*/tokens.npy"))
    path.rename(tmp_path / "elsewhere.npy")
    path.symlink_to(tmp_path / "elsewhere.npy")
    assert location.newest().state.entries == 1
    folders[1].rename(tmp_path / "elsewhere")
    folders[1].symlink_to(tmp_path / "elsewhere")
    assert location.newest().state.entries == 0


def test_a_snapshot_from_the_future_counts_as_the_oldest(where, tmp_path) -> None:
    location = opened(where, tmp_path)
    ahead = int(time.time() * 1000) + 86_400_000
    location.write([segment([1])], state(ahead, 7))
    assert location.newest().state.entries == 7  # better than none
    location.write([segment([1])], state(NOW, 8))
    location.write([segment([1])], state(NOW + 1, 9))
    assert [each.entries for each in location.listing()] == [9, 8, 7]
    assert location.newest().state.entries == 9
    assert location.prune() == 1
    assert [each.entries for each in location.listing()] == [9, 8]


def test_a_foreign_snapshot_is_passed_over(tmp_path, caplog) -> None:
    location, _ = three(tmp_path)
    foreign = "0" * 32
    SnapshotPlace(tmp_path / "other", f"{foreign}:default", foreign, 100).write(
        [segment([1])], state(NOW + 9, 9, f"{foreign}:default")
    )
    folder = next((tmp_path / "other").glob("*/*/snapshot-*"))
    shutil.copytree(folder, root(tmp_path) / folder.name)
    SnapshotPlace(tmp_path / "third", NAMESPACE, FINGERPRINT, 101).write([segment([1])], state(NOW + 10, 9))
    folder = next((tmp_path / "third").glob("*/*/snapshot-*"))
    shutil.copytree(folder, root(tmp_path) / folder.name)
    with caplog.at_level(logging.WARNING, WARNED):
        assert location.newest().state.entries == 2
    assert len(caplog.records) == 2


def test_tenants_do_not_see_each_other(where, tmp_path) -> None:
    opened(where, tmp_path).write([segment([1])], state())
    assert opened(where, tmp_path, f"{FINGERPRINT}:other").newest() is None


@pytest.mark.parametrize("tenant", ["", ".", "..", "a/b", "../x", "a b", "a" * 65, "a\n", "a:b", "\u00e4"])
def test_a_tenant_must_be_a_name(tenant, tmp_path) -> None:
    with pytest.raises(InvalidInputError, match="tenant"):
        SnapshotPlace(tmp_path, f"{FINGERPRINT}:{tenant}", FINGERPRINT, 100)


def test_two_writers_at_once(where, tmp_path) -> None:
    def write(entries: int) -> None:
        opened(where, tmp_path).write([segment([7, 8, entries])], state(NOW, entries))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    location = opened(where, tmp_path)
    assert sorted(each.entries for each in location.listing()) == list(range(6))
    assert count(location.newest(), 7, 8) == 1


def test_prune_keeps_the_newest(where, tmp_path) -> None:
    location = opened(where, tmp_path)
    for number in range(4):
        location.write([segment([7, 8])], state(NOW + number, number))
    assert location.prune() == 2
    assert [each.entries for each in location.listing()] == [3, 2]
    assert location.prune() == 0
    assert location.prune(1) == 1


def test_prune_does_not_count_what_nobody_can_use(tmp_path) -> None:
    location, folders = three(tmp_path)
    for folder in folders[1:]:
        tear_log(folder)
    location.prune(1)
    assert folders[0].exists()
    assert location.newest().state.entries == 0


def test_prune_sweeps_what_crashed_writers_left(tmp_path, monkeypatch) -> None:
    location, folders = three(tmp_path)
    with monkeypatch.context() as patch:  # a writer that is killed removes nothing
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(DatastoreError):
            location.write([segment([1])], state())
    left = [each for each in root(tmp_path).iterdir() if each not in folders]
    assert len(left) == 1
    location.prune(3)
    assert left[0].exists()
    old = time.time() - 7200
    for each in (*left[0].rglob("*"), left[0]):
        os.utime(each, (old, old))
    assert location.prune(3) == 0
    assert sorted(root(tmp_path).iterdir()) == folders


def test_what_is_mapped_outlives_its_folder(where, tmp_path) -> None:
    location = opened(where, tmp_path)
    location.write([segment([7, 8, 9])], state(NOW, 1))
    found = location.newest()
    for number in (2, 3):
        location.write([segment([5])], state(NOW + number, number))
    assert location.prune(1) == 2
    assert location.newest().state.entries == 3
    assert count(found, 7, 8) == 1


def test_a_full_disk_leaves_nothing(where, tmp_path, monkeypatch) -> None:
    location = opened(where, tmp_path)
    location.write([segment([1])], state())
    before = sorted((tmp_path / "snapshots").rglob("*"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("retrieval_draft.index.segments.segment.save_array", full)
        with pytest.raises(DatastoreError, match="No space left"):
            location.write([segment([2])], state(NOW + 1))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(DatastoreError, match="No space left"):
            location.write([segment([2])], state(NOW + 1))
    assert segment_module.save_array is not full
    assert sorted((tmp_path / "snapshots").rglob("*")) == before
    assert len(location.listing()) == 1


def test_a_location_that_cannot_be_listed(tmp_path, monkeypatch) -> None:
    location = opened("memory://unreachable", tmp_path)

    def down(*_, **__):
        raise ConnectionError("down")

    memory = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(memory, "ls", down)
    monkeypatch.setattr(memory, "exists", down)
    with pytest.raises(DatastoreError, match="down"):
        location.newest()


def test_a_url_without_fsspec(tmp_path, monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.partition(".")[0] == "fsspec":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DatastoreError, match=r"pip install 'retrieval_draft\[store\]'"):
        opened("memory://x", tmp_path)
    assert opened(f"file://{tmp_path}/snapshots", tmp_path).newest() is None


def test_a_location_that_cannot_be_used_shows_no_secret(tmp_path) -> None:
    for url in ("ftp://me:s3cret@127.0.0.1:1/x", "nothing://me:s3cret@h", "github://me:s3cret@"):
        with pytest.raises(DatastoreError, match="cannot be kept") as refused:
            opened(url, tmp_path)
        lines = traceback.TracebackException.from_exception(refused.value).format()
        assert not any("s3cret" in line for line in lines if not line.startswith("  File"))


def test_a_folder_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").touch()
    location = opened(tmp_path / "file", tmp_path)
    with pytest.raises(DatastoreError, match="Cannot write the snapshot"):
        location.write([segment([1])], state())
