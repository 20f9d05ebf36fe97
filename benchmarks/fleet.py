"""A fleet by replay: what servers gain from each other's texts, rows and calibration, and what that costs.

No Redis runs: every entry is encoded, counted and read as on the wire, and all have it before the next
request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_draft.bench.replay import Counts, Replayer, Trace, read_traces
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.observations import Observations
from retrieval_draft.index.segments.segment_session import Segments
from retrieval_draft.index.source import TokenArray
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.counts import StoreCounts
from retrieval_draft.index.store.entry import EntryCodec
from retrieval_draft.index.store.learned import Learned, other_id
from retrieval_draft.index.store.learned_entry import LearnedEntry
from retrieval_draft.index.store.log_replica import FIELD, LogReplica
from retrieval_draft.index.store.outbox import Run
from retrieval_draft.index.store.run_encoder import RunEncoder

__all__ = ["LEVELS", "measure_fleet"]

LEVELS = ("nothing", "texts", "replies", "rows", "all")
"""Shared in turn: nothing; texts to look up; what follows in them, learned by the matrices; rows, and with
them where replies begin; calibration, with which a server starts at its first request."""

CALIBRATED_EVERY = 16
"""Requests of the fleet from one calibration that is sent to the next."""

ENTRY_IN_REDIS = 24
"""Bytes that a stream adds to an entry: its id and field, packed."""

_NAMESPACE = f"{'f' * 32}:fleet"


class _Fan(Learned):
    """One reader's part for all servers of the simulation, which read the same entries."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary, "f" * 32)
        self.parts: list[Learned] = []

    def take(self, server: bytes, entry: LearnedEntry) -> None:
        for part in self.parts:
            part.take(server, entry)

    def note(self, server: bytes, sequence: int, run: bytes) -> None:
        for part in self.parts:
            part.note(server, sequence, run)

    def work(self) -> None:
        for part in self.parts:
            part.work()


class _Store:
    """The store of one server: its own numbers and rows, all servers' texts."""

    def __init__(
        self, number: int, mirror: LogReplica, codec: EntryCodec, vocabulary: int, level: str
    ) -> None:
        self._mirror = mirror
        self._level = level
        self.learned = Learned(vocabulary, "f" * 32)
        server = number.to_bytes(15, "little") + b"\x00"
        self.learned.own = (server, other_id(server))
        share = 0.5 if level in ("rows", "all") else 0.0
        self.encoder = RunEncoder(server, mirror, codec, vocabulary, 1 << 15, share)
        self.told: Observations | None = None

    @property
    def segments(self) -> Segments:
        return self._mirror.segments

    @property
    def nbytes(self) -> int:
        return self._mirror.nbytes + self.learned.nbytes + self.encoder.nbytes

    def observe(self, prompt: TokenArray) -> Observations | None:
        self.told = Observations(prompt) if self._level in ("rows", "all") else None
        return self.told

    def flush(self) -> bool:
        return True


@dataclass(slots=True)
class _Sent:
    """Entries and bytes, of texts and of what was learned."""

    texts: int = 0
    text_bytes: int = 0
    learned: int = 0
    learned_bytes: int = 0


def measure_fleet(
    paths: Sequence[Path],
    *,
    servers: Sequence[int] = (4, 16, 64),
    nodes: int = 60,
    levels: Sequence[str] = LEVELS,
    share: str = "all",
    limit: int | None = None,
    points: int = 5,
) -> dict[str, Any]:
    """Replays traces in their order, each on the next server.

    Args:
        paths: Trace files.
        servers: Sizes of the fleet.
        nodes: Draft nodes of every step.
        levels: Of `LEVELS`.
        share: "reply" or "all".
        limit: Replay only so many requests.
        points: Number of points of each curve.

    Returns:
        Tokens per step of one server that sees everything, and of each fleet: the ratio, the curve over
        requests seen, bytes of a request, and memory of a server.
    """
    traces = list(islice(read_traces(paths), limit))
    if not traces:
        raise InvalidInputError("There is no request to replay.", "Name traces with --traces.")
    vocabulary = max(int(ids.max(initial=0)) for trace in traces for ids in (trace.prompt, trace.output)) + 1
    if any(trace.top_tokens is not None for trace in traces):
        vocabulary = 1 + max(
            vocabulary - 1, *(int(each.top_tokens.max()) for each in traces if each.top_tokens is not None)
        )
    one = _replay(traces, vocabulary, 1, nodes, "nothing", share, points)
    found = []
    for size in servers:
        for level in levels:
            fleet = _replay(traces, vocabulary, size, nodes, level, share, points)
            found.append({**fleet, "ratio": fleet["tokens_per_step"] / one["tokens_per_step"]})
    return {"one_server": one, "fleets": found, "requests": len(traces), "nodes": nodes, "share": share}


def _replay(
    traces: Sequence[Trace], vocabulary: int, servers: int, nodes: int, level: str, share: str, points: int
) -> dict[str, Any]:
    codec = EntryCodec(_NAMESPACE, "k" * 32, 1 << 15)
    config = StoreConfig("redis://nowhere", max_bytes=1 << 30)
    mirror = LogReplica(vocabulary, codec, config, StoreCounts())
    fan = _Fan(vocabulary)
    mirror.learned = fan
    stores: list[Any] = [_Store(each, mirror, codec, vocabulary, level) for each in range(servers)]
    if level in ("replies", "rows", "all"):
        fan.parts = [store.learned for store in stores]
    shared = level != "nothing"
    replayers = [
        Replayer(
            DraftConfig(nodes=nodes),
            nodes,
            True,
            DraftStores(vocabulary, shared=store if shared else None),
            Calibration(),
        )
        for store in stores
    ]
    total, sent, curve = Counts(), _Sent(), []
    part = Counts()
    newest = b""
    try:
        for number, trace in enumerate(traces):
            replayer = replayers[number % servers]
            if newest and number < servers:
                replayer.calibration.decode(newest, "fleet")
            counts = replayer.run(trace)
            if level == "all" and number % CALIBRATED_EVERY == CALIBRATED_EVERY - 1:
                newest = replayer.calibration.encode()
            for sums in (total, part):
                sums.tokens += counts.tokens
                sums.steps += counts.steps
            if shared:
                _share(stores[number % servers], mirror, trace, share, sent, number)
            if (number + 1) * points // len(traces) > number * points // len(traces):
                curve.append([number + 1, part.tokens_per_step])
                part = Counts()
        memory = max(replayer.nbytes for replayer in replayers)
    finally:
        for replayer in replayers:
            replayer.close()
    return {
        "servers": servers,
        "level": level,
        "tokens_per_step": total.tokens_per_step,
        "curve": curve,
        "text_bytes_per_request": sent.text_bytes / len(traces),
        "learned_bytes_per_request": sent.learned_bytes / len(traces),
        "entries_per_request": (sent.texts + sent.learned) / len(traces),
        "calibration_bytes": len(newest),
        "memory_mb": memory / 1e6,
    }


def _share(store: _Store, mirror: LogReplica, trace: Trace, share: str, sent: _Sent, number: int) -> None:
    """Encodes a request as its server would, counts the entries, and has all servers read them."""
    everything = share == "all"
    told, store.told = store.told, None
    learned = () if told is None else told.shareable(everything)
    nothing = np.empty(0, np.int32)
    taken = [Run(trace.prompt if everything else nothing, trace.output, learned)]
    entries = [*store.encoder.encode(taken), *store.encoder.rows(taken)]
    items = []
    for index, entry in enumerate(entries):
        is_text = entry[1:2] == b"\x01"
        sent.texts += is_text
        sent.learned += not is_text
        size = len(entry) + ENTRY_IN_REDIS
        sent.text_bytes += size if is_text else 0
        sent.learned_bytes += 0 if is_text else size
        items.append([b"%d-%d" % (1000 * (number + 1), index), [FIELD, entry]])
    if items:
        mirror.take("0", items)
        mirror.publish()
        while mirror.sort():
            pass
        mirror.learned.work()
