"""Merging of indexes, and of small segments into larger ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._files import sync_file, sync_folder
from retrieval_draft.errors import DatastoreError, TokenizerMismatchError
from retrieval_draft.index.segments.index_folder import IndexFolder, SegmentEntry
from retrieval_draft.index.segments.segment import Segment

__all__ = ["RATIO", "compacted", "join_segments", "joined_texts", "merge_indexes"]

RATIO = 4
"""A segment is kept when it is so many times as large as all newer ones together."""


def joined_texts(
    parts: Sequence[tuple[NDArray[Any], NDArray[np.int32]]],
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Concatenates arrays of texts; returns one array and int32 start indices of its texts."""
    shifts = np.cumsum([0, *(len(texts) for texts, _ in parts)])
    documents = [starts + np.int32(shift) for (_, starts), shift in zip(parts, shifts[:-1], strict=True)]
    return np.concatenate([texts for texts, _ in parts]), np.concatenate(documents)


def join_segments(segments: Sequence[Segment], vocabulary: int, threads: int = 1) -> Segment:
    """Merges segments into one with all their texts, in order."""
    parts = [(segment.texts(vocabulary), segment.documents) for segment in segments]
    return Segment.join(*joined_texts(parts), vocabulary, threads)


def compacted(
    index: IndexFolder, entries: Sequence[SegmentEntry], most: int, threads: int
) -> list[SegmentEntry]:
    """Joins the newest segments while the next older one is small relative to them.

    Args:
        index: The index that holds them and gets the joined ones.
        entries: Oldest first.
        most: Tokens of a segment at most.
        threads: Workers that sort.

    Returns:
        Segments to publish.
    """
    kept = list(entries)
    first = len(kept) - 1
    size = kept[first].tokens + kept[first].documents if kept else 0
    while first > 0 and kept[first - 1].tokens < RATIO * size:
        size += kept[first - 1].tokens + kept[first - 1].documents
        if size > most:
            break
        first -= 1
    if len(kept) - first > 1:
        opened = [index.open_segment(entry) for entry in kept[first:]]
        kept[first:] = [index.write(join_segments(opened, index.manifest.vocabulary_size, threads))]
    return kept


def merge_indexes(
    target: IndexFolder,
    sources: Sequence[IndexFolder],
    most: int,
    threads: int = 1,
    watch: Callable[[int], object] | None = None,
) -> None:
    """Appends the texts of all `sources` to those of `target`, in as few segments as `most` allows.

    Args:
        target: May be empty. It changes atomically, at the end.
        sources: For the same tokenizer; they do not change.
        most: Tokens of a segment at most.
        threads: Workers that sort.
        watch: Called with the tokens of each finished segment.

    Raises:
        TokenizerMismatchError: A source is for another tokenizer.
        DatastoreError: A file is missing or torn, or the disk is full; `target` stays as it was.
    """
    for source in sources:
        try:
            source.check(target.manifest.fingerprint, target.manifest.vocabulary_size)
        except TokenizerMismatchError as error:
            raise TokenizerMismatchError(
                f"{source.path} and {target.path} are for different tokenizers, so they cannot be joined.",
                "Build both with one tokenizer.",
            ) from error
    with target.locked():
        target.reload()
        target.sweep()
        every = [(index, entry) for index in (target, *sources) for entry in index.manifest.segments]
        groups: list[list[tuple[IndexFolder, SegmentEntry]]] = []
        size = most + 1
        for index, entry in every:
            mine = entry.tokens + entry.documents
            if size + mine > most:
                groups.append([])
                size = 0
            groups[-1].append((index, entry))
            size += mine
        done: list[SegmentEntry] = []
        for group in groups:
            if len(group) == 1:
                index, entry = group[0]
                done.append(entry if index.path == target.path else _copied(index, target, entry))
            else:
                opened = [index.open_segment(entry) for index, entry in group]
                done.append(target.write(join_segments(opened, target.manifest.vocabulary_size, threads)))
            if watch is not None:
                watch(done[-1].tokens)
        target.publish(done)
        target.sweep()


def _copied(source: IndexFolder, target: IndexFolder, entry: SegmentEntry) -> SegmentEntry:
    """A segment that stays as it is: linked where both are on one disk, else copied."""
    destination = target.path / entry.name
    unfinished = destination.with_name(f"{entry.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if destination.exists():  # merged before
            return entry
        unfinished.mkdir()
        for name in entry.files:
            _link(source.path / entry.name / name, unfinished / name)
        sync_folder(unfinished)
        unfinished.rename(destination)
        sync_folder(target.path)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise DatastoreError(
            f"Cannot copy a segment of {source.path} to {target.path}: {error.strerror or error}.",
            "Free space or permit writing; the index is as it was.",
        ) from error
    return entry


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync_file(target)
