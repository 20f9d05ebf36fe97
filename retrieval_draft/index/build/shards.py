"""Index builds in shards on a Ray cluster: each task reads, tokenises and sorts some of the files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.build.builder import (
    BuildState,
    check_columns,
    publish,
    read_runs,
    save_journal,
)
from retrieval_draft.index.build.documents import DocumentFile, ReadReport
from retrieval_draft.index.build.encoder import Encoder
from retrieval_draft.index.build.journal import Journal, Position, work_key
from retrieval_draft.index.build.merge import compacted
from retrieval_draft.index.build.options import BuildOptions
from retrieval_draft.index.segments.index_folder import IndexFolder, SegmentEntry
from retrieval_draft.index.segments.segment import Segment

__all__ = ["build_on_ray", "build_shard", "make_shards"]

SHARD_BYTES = 1 << 26

ShardResult = tuple[list[SegmentEntry], ReadReport, int]


def make_shards(files: Sequence[DocumentFile], most_bytes: int = SHARD_BYTES) -> list[list[DocumentFile]]:
    """Files in groups of about `most_bytes`, in order; a larger file is a group of its own.

    Example:
        sizes 30 30 10 90 5, most_bytes 64  ->  [30 30], [10], [90], [5]
    """
    shards: list[list[DocumentFile]] = []
    size = most_bytes + 1
    for file in files:
        if size + file.nbytes > most_bytes:
            shards.append([])
            size = 0
        shards[-1].append(file)
        size += file.nbytes
    return shards


def build_shard(
    path: str, files: Sequence[DocumentFile], tokenizer: str, name: str, options: BuildOptions
) -> ShardResult:
    """Reads and sorts one shard into segments of the index's folder. They count once they are published.

    Args:
        path: The index, on a disk that all machines share.
        files: The shard.
        tokenizer: From `Encoder.to_json`.
        name: Of the tokenizer.
        options: Options of reading and sorting.

    Returns:
        Its segments, counts of documents read and skipped, and tokens.
    """
    index = IndexFolder.open(Path(path))
    encoder = Encoder.from_json(tokenizer, name)
    state = BuildState()
    entries = [
        index.write(Segment.join(texts, documents, encoder.vocabulary, options.workers))
        for texts, documents, _ in read_runs(files, encoder, options, options.most, Position(), state)
    ]
    return entries, state.report, state.tokens


def build_on_ray(
    index: IndexFolder,
    files: Sequence[DocumentFile],
    encoder: Encoder,
    options: BuildOptions,
    address: str | None = None,
    watch: Callable[[BuildState], object] | None = None,
    replace: bool = False,
) -> BuildState:
    """Runs `build_index` with shards as tasks of a Ray cluster. An interruption keeps finished shards.

    Args:
        index: On a disk that all machines share.
        files: The same on all machines.
        encoder: The tokenizer.
        options: Options of reading and sorting; workers are CPUs of a task.
        address: Of the cluster, or None for the one that Ray finds, else a local one.
        watch: Called after each shard.
        replace: Whether to drop the present contents of the index.

    Raises:
        InvalidInputError: Ray is not installed, or skip, limit or a pipe are given.
    """
    if options.skip or options.limit is not None or any(file.is_stream for file in files):
        raise InvalidInputError(
            "A build on Ray reads files in no fixed order, so skip, limit and pipes have no meaning there.",
            "Leave them out, or build without --executor.",
        )
    try:
        import ray
    except ImportError as error:
        raise InvalidInputError(
            "A build on Ray needs the package ray.", 'Install it: pip install "retrieval_draft[ray]".'
        ) from error
    index.check(encoder.fingerprint, encoder.vocabulary)
    shards = make_shards(files)
    state = BuildState()
    with index.locked():
        index.reload()
        base = [] if replace else list(index.manifest.segments)
        key = work_key(files, "shards", len(shards), SHARD_BYTES, options.text_column, options.segment_tokens)
        journal = Journal.load(index.path, key, [entry.name for entry in base], index.manifest)
        journal.shards = {
            number: done for number, done in journal.shards.items() if 0 <= number < len(shards)
        }
        index.sweep(journal.names)
        if journal.is_published:
            Journal.remove(index.path)
            return state
        state.tokens = journal.tokens
        state.report.merge(journal.position.left_out)
        state.done_bytes = sum(file.nbytes for shard in journal.shards for file in shards[shard])
        started = not ray.is_initialized()
        if started:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        try:
            for number, (entries, report, tokens) in _run(ray, index, shards, journal, encoder, options):
                state.report.merge(report)
                journal.shards[number] = entries
                journal.position = Position(left_out=state.report.left_out())
                save_journal(index, journal)
                state.tokens += tokens
                state.file += len(shards[number])
                state.done_bytes += sum(file.nbytes for file in shards[number])
                state.file_characters = state.report.characters
                if watch is not None:
                    watch(state)
        finally:
            if started:
                ray.shutdown()
        check_columns(state)
        made = [entry for number in sorted(journal.shards) for entry in journal.shards[number]]
        publish(index, journal, compacted(index, [*base, *made], options.most, options.workers))
    return state


def _run(
    ray: Any,
    index: IndexFolder,
    shards: Sequence[Sequence[DocumentFile]],
    journal: Journal,
    encoder: Encoder,
    options: BuildOptions,
) -> Any:
    """Yields each unfinished shard's number and result, in order of completion."""
    task = ray.remote(build_shard).options(num_cpus=options.workers)
    tokenizer = ray.put(encoder.to_json())
    path = str(index.path.resolve())
    running = {
        task.remote(path, shard, tokenizer, encoder.name, options): number
        for number, shard in enumerate(shards)
        if number not in journal.shards
    }
    while running:
        ready, _ = ray.wait(list(running), num_returns=1)
        for result in ready:
            yield running.pop(result), ray.get(result)
