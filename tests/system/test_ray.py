"""An index built on a real local Ray. ``./scripts/test_ray.sh`` installs what it needs."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.build import shards
from retrieval_draft.index.build.builder import build_index
from retrieval_draft.index.build.documents import find_files
from retrieval_draft.index.build.encoder import Encoder
from retrieval_draft.index.build.options import BuildOptions
from retrieval_draft.index.segments.index_folder import IndexFolder
from tests.support.tiny import byte_tokenizer

ENCODER = Encoder(byte_tokenizer(), "bytes")


def write_files(folder: Path, count: int) -> list[str]:
    random = np.random.default_rng(0)
    paths = []
    for number in range(count):
        path = folder / f"{number:02}.jsonl"
        texts = ["word " * int(random.integers(1, 60)) + str(number) for _ in range(20)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        paths.append(str(path))
    return paths


def documents(index: IndexFolder) -> list[bytes]:
    found = []
    for segment in index.segments():
        joined = segment.texts(ENCODER.vocabulary)
        bounds = pairwise([*segment.documents.tolist(), len(joined)])
        found += [joined[begin:end].tobytes() for begin, end in bounds]
    return found


def test_shards_are_files_in_order() -> None:
    files = [shards.DocumentFile(str(size), "text", size) for size in (30, 30, 10, 90, 5)]
    sizes = [[file.nbytes for file in shard] for shard in shards.make_shards(files, 64)]
    assert sizes == [[30, 30], [10], [90], [5]]


@pytest.mark.parametrize("options", [BuildOptions(skip=1), BuildOptions(limit=1)])
def test_what_needs_an_order_is_refused(tmp_path, options: BuildOptions) -> None:
    index = IndexFolder.create(tmp_path / "index", ENCODER.fingerprint, ENCODER.vocabulary)
    with pytest.raises(InvalidInputError, match="no fixed order"):
        shards.build_on_ray(index, find_files(write_files(tmp_path, 1)), ENCODER, options)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_same_index_as_here(tmp_path, monkeypatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(shards, "make_shards", lambda files: [[file] for file in files])
    files = find_files(write_files(tmp_path, 5))
    local = IndexFolder.create(tmp_path / "local", ENCODER.fingerprint, ENCODER.vocabulary)
    build_index(local, files, ENCODER, BuildOptions())
    spread = IndexFolder.create(tmp_path / "spread", ENCODER.fingerprint, ENCODER.vocabulary)

    class StopError(Exception):
        pass

    seen: list[int] = []

    def stop(state: object) -> None:
        seen.append(1)
        if len(seen) == 2:
            raise StopError

    with pytest.raises(StopError):  # interrupted after two shards
        shards.build_on_ray(spread, files, ENCODER, BuildOptions(), watch=stop)
    assert IndexFolder.open(spread.path).manifest.tokens == 0
    seen.clear()
    state = shards.build_on_ray(spread, files, ENCODER, BuildOptions(), watch=seen.append)
    assert len(seen) == 3
    assert state.tokens == local.manifest.tokens == spread.manifest.tokens
    assert documents(spread) == documents(local)
    assert spread.verify() == []
