"""Measurements of datastores: building, opening and lookups of an index, and a growing history."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_draft.bench.measuring import percentiles
from retrieval_draft.bench.provenance import provenance
from retrieval_draft.bench.synthetic_text import SyntheticText
from retrieval_draft.index.build.options import BuildOptions
from retrieval_draft.index.corpus import Corpus, CorpusSource
from retrieval_draft.index.history import History, HistorySource
from retrieval_draft.index.segments.index_folder import IndexFolder
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.segments.segment_store import GRACE
from retrieval_draft.index.source import DraftSource, TokenArray

__all__ = ["measure_history", "measure_index", "resident_bytes"]

SMALL = 1_000_000
_STEPS = 4000
_REQUEST = 1000


def measure_index(
    tokens: int,
    *,
    vocabulary: int = 32000,
    workers: int = 2,
    nodes: int = 60,
    segment_tokens: int | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Builds an index of synthetic text from tokens to files, opens it and drafts from it.

    A smaller index of 1M tokens is measured in turn with it, to show the growth of lookups.

    Args:
        tokens: Of the index.
        vocabulary: Number of token ids.
        workers: Threads that sort.
        nodes: Of each proposal.
        segment_tokens: Tokens of a segment; None for the default of ``index build``.
        folder: Folder to write to; the default is a temporary folder that is removed.

    Returns:
        The object that ``bench index --json`` prints; a lookup is observing one to four tokens and proposing.
    """
    text = SyntheticText(vocabulary)
    segment_tokens = segment_tokens or BuildOptions().most
    _sort_something(vocabulary)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        large = _build(text, tokens, vocabulary, workers, segment_tokens, Path(scratch) / "large")
        small = _build(text, min(SMALL, tokens), vocabulary, workers, segment_tokens, Path(scratch) / "small")
        before = resident_bytes()
        begin = time.perf_counter()
        corpus = Corpus.open(Path(scratch) / "large")
        opened = time.perf_counter() - begin
        after = resident_bytes()
        sources = [CorpusSource([corpus]), CorpusSource([Corpus.open(Path(scratch) / "small")])]
        query = text.tokens(4 * _STEPS, seed=99)
        lookups = _lookups(sources, query, nodes)
        manifest = corpus.folder.manifest
        return {
            "build_tokens_per_second": tokens / large["seconds"],
            "build_memory_bytes": large["memory"],
            "bytes_per_token": manifest.nbytes / manifest.tokens,
            "open_ms": 1000 * opened,
            "open_memory_bytes": None if before is None or after is None else after - before,
            "lookup_us": percentiles(lookups[0], 50, 99, 100),
            "lookup_us_small": percentiles(lookups[1], 50, 99, 100),
            "growth": float(np.median(lookups[0]) / np.median(lookups[1])),
            "tokens": manifest.tokens,
            "tokens_small": small["tokens"],
            "segments": len(manifest.segments),
            "vocabulary": vocabulary,
            "workers": workers,
            "nodes": nodes,
            "provenance": provenance(),
        }


def measure_history(tokens: int, *, vocabulary: int = 32000, nodes: int = 60) -> dict[str, Any]:
    """Fills a history, then drafts from it while requests of 1,000 tokens are added, and then evicts.

    Args:
        tokens: To fill it with.
        vocabulary: Number of token ids.
        nodes: Of each proposal.

    Returns:
        Bytes a token, and microseconds of a step's part in the history (observing, proposing, and at the end
        of a request adding it): alone, while requests are added, and while old ones are evicted; and resident
        bytes before and after the eviction of half of it.
    """
    text = SyntheticText(vocabulary)
    _sort_something(vocabulary)
    history = History(vocabulary, max_bytes=1 << 34)
    source = HistorySource(history)
    none = np.empty(0, np.int32)
    made = text.tokens(tokens, seed=1)
    for begin in range(0, tokens, _REQUEST):
        history.add(none, made[begin : begin + _REQUEST])
        if begin % (200 * _REQUEST) == 0:
            history.flush()
    history.flush()
    held = history.num_tokens
    each = history.nbytes / held
    segments = len(history.segments)
    query = text.tokens(4 * _STEPS, seed=99)
    quiet = _lookups([source], query, nodes)[0]
    busy = _steps_while(history, source, text, query, nodes)
    history.flush()
    before = resident_bytes()
    history.limit(history.nbytes // 2)
    evicting = _steps_while(history, source, text, query, nodes)
    history.flush()
    time.sleep(2 * GRACE + 1)
    after = resident_bytes()
    left = history.num_tokens
    history.close()
    return {
        "tokens": held,
        "bytes_per_token": each,
        "segments": segments,
        "step_us": percentiles(quiet, 50, 99, 100),
        "step_us_ingesting": percentiles(busy, 50, 99, 100),
        "step_us_evicting": percentiles(evicting, 50, 99, 100),
        "tokens_after_eviction": left,
        "resident_bytes": before,
        "resident_bytes_after_eviction": after,
        "vocabulary": vocabulary,
        "nodes": nodes,
        "provenance": provenance(),
    }


def resident_bytes() -> int | None:
    """Resident memory of this process, mapped files included; None where the system does not report it."""
    try:
        status = Path("/proc/self/statm").read_text()
    except OSError:
        return None
    return int(status.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _build(
    text: SyntheticText, tokens: int, vocabulary: int, workers: int, segment_tokens: int, path: Path
) -> dict[str, Any]:
    """Builds an index from tokens; generating them is not counted."""
    index = IndexFolder.create(path, "synthetic", vocabulary)
    entries = []
    seconds = 0.0
    peak = _Peak()
    for number, begin in enumerate(range(0, tokens, segment_tokens)):
        joined, documents = text.joined(min(segment_tokens, tokens - begin), seed=number)
        with peak:
            start = time.perf_counter()
            entries.append(index.write(Segment.join(joined, documents, vocabulary, workers)))
            seconds += time.perf_counter() - start
    index.publish(entries)
    return {"seconds": seconds, "memory": peak.nbytes, "tokens": index.manifest.tokens}


class _Peak:
    """Peak of resident memory inside the context, above that before."""

    def __init__(self) -> None:
        self.nbytes = 0

    def __enter__(self) -> None:
        self._before = resident_bytes() or 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.nbytes = max(self.nbytes, (resident_bytes() or 0) - self._before)


def _lookups(sources: Sequence[DraftSource], query: TokenArray, nodes: int) -> list[list[float]]:
    """Microseconds of each step's observing and proposing, the sources in turn."""
    sessions = [source.open(query[:32]) for source in sources]
    times: list[list[float]] = [[] for _ in sources]
    random = np.random.default_rng(0)
    position = 32
    while position + 4 <= len(query) and len(times[0]) < _STEPS:
        accepted = query[position : position + int(random.integers(1, 5))]
        for session, found in zip(sessions, times, strict=True):
            begin = time.perf_counter()
            session.observe(accepted)
            session.propose(nodes)
            found.append(1e6 * (time.perf_counter() - begin))
        position += len(accepted)
    return [found[16:] for found in times]


def _steps_while(
    history: History, source: HistorySource, text: SyntheticText, query: TokenArray, nodes: int
) -> list[float]:
    """Steps of a decoding thread, with a forward pass's pause between, while finished requests are added."""
    prompts = [text.tokens(_REQUEST, seed=1000 + number) for number in range(20)]
    none = np.empty(0, np.int32)
    session = source.open(query[:32])
    times = []
    for step in range(20 * len(prompts)):
        accepted = query[32 + 2 * step : 34 + 2 * step]
        begin = time.perf_counter()
        session.observe(accepted)
        session.propose(nodes)
        if step % 20 == 0:
            history.add(none, prompts[step // 20])
        times.append(1e6 * (time.perf_counter() - begin))
        time.sleep(0.002)
    return times


def _sort_something(vocabulary: int) -> None:
    """Loads the kernels, so that no measurement waits for them."""
    segment = Segment.build([np.arange(64, dtype=np.int32) % min(vocabulary, 7)] * 40, vocabulary)
    segment.count(np.array([1, 2, 3], np.int32))
