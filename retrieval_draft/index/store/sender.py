"""The thread that sends this server's texts."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.counts import StoreCounts
from retrieval_draft.index.store.entry import EntryCodec, holds_text
from retrieval_draft.index.store.log_replica import FIELD, KEPT_SECONDS, LogReplica, stream_id
from retrieval_draft.index.store.outbox import Outbox, Run
from retrieval_draft.index.store.rate_limit import BURST, RateLimit
from retrieval_draft.index.store.reconnecting_worker import ReconnectingWorker, server_run
from retrieval_draft.index.store.run_encoder import RunEncoder

__all__ = ["Sender"]

_KEPT_BYTES = 1 << 24
_RUNS = 128
_TOKENS = 1 << 17
"""Tokens of one pipeline."""

_PACE = 0.8
"""Share of the readers' rate limit: entries sent evenly may arrive in bursts."""

_TRIM_SECONDS = 2.0

_REVIVE = """
local last = '18446744073709551615'
local found = redis.call('XINFO', 'STREAM', KEYS[1])
for index = 1, #found, 2 do
  if found[index] == 'last-generated-id' and found[index + 1] ~= last .. '-' .. last then return 0 end
end
local entries = redis.call('XRANGE', KEYS[1], '-', '+')
redis.call('DEL', KEYS[1])
for round = 1, 2 do
  for _, entry in ipairs(entries) do
    local id, fields = entry[1], entry[2]
    local is_late = string.sub(id, 1, #last + 1) == last .. '-'
    if #fields == 2 and is_late == (round == 2) then
      redis.pcall('XADD', KEYS[1], is_late and '*' or id, fields[1], fields[2])
    end
  end
end
return 1
"""
"""Makes a stream writable again. After one entry with the largest possible id no other can be added: all
entries go into a new stream of that name, in their order, with their ids or, where those are among the
largest possible, with new ones. Readers notice that ids have decreased, and add no entry twice."""


class Sender:
    """Appends entries to one stream, in the order of their sequence numbers.

    Invariant: an entry is dropped from `_unsent` only when Redis has accepted it and all before it; it then
    stays in `_kept` for a while. When another Redis answers than before, kept entries are sent again. So
    readers get every accepted entry at least once, and add it once.

    Args:
        server: This server's id.
        keys: The stream, and the ones to use where its key has another type.
        outbox: Runs to send.
        mirror: Finds the part of a prompt that is known already.
        codec: Writes entries.
        link: To Redis.
        config: Limits.
        counts: Counters to add to.
        vocabulary: Number of token ids.
        is_cluster: Whether Redis is one.
        stopped: Ends the thread when set.
        stream_bytes: Cap of the stream.
    """

    def __init__(
        self,
        server: bytes,
        keys: Sequence[bytes],
        outbox: Outbox,
        mirror: LogReplica,
        codec: EntryCodec,
        link: ReconnectingWorker,
        config: StoreConfig,
        counts: StoreCounts,
        vocabulary: int,
        is_cluster: bool,
        stopped: threading.Event,
        stream_bytes: int,
    ) -> None:
        self._keys = deque(keys)
        self._outbox = outbox
        self._link = link
        self._keep_ms = int(1000 * config.stream_seconds)
        self._counts = counts
        self._is_cluster = is_cluster
        self._stopped = stopped
        self._stream_bytes = stream_bytes
        self._rate = RateLimit(_PACE * config.tokens_per_second)
        most_tokens = min(config.max_tokens, int(_PACE * BURST * config.tokens_per_second))
        self._encoder = RunEncoder(server, mirror, codec, vocabulary, most_tokens, config.row_share)
        self._unsent: deque[bytes] = deque()
        self._kept: deque[tuple[float, bytes]] = deque()
        self._kept_bytes = 0
        self._returned: deque[bytes] = deque()
        self._again = 0  # number of entries in `_unsent` that were accepted before
        self._run: str | None = None
        self._client: Any = None
        self._look_again = False
        self._lost: float | None = None  # time since which Redis may be another one
        self._keep_seconds = KEPT_SECONDS + config.timeout
        self._trimmed = 0.0
        self._measures = True  # until that is denied
        self._last_seconds = 0.0  # of the last entry's id

    @property
    def sequence(self) -> int:
        """Entries with texts that were encoded so far."""
        return self._encoder.sequence

    @property
    def _key(self) -> bytes:
        return self._keys[0]

    @property
    def idle(self) -> bool:
        """True if everything was accepted."""
        return not self._outbox.unfinished and not self._unsent

    @property
    def nbytes(self) -> int:
        """Bytes of entries being sent or kept."""
        return self._kept_bytes + sum(map(len, tuple(self._unsent))) + self._encoder.nbytes

    def run(self) -> None:
        """Runs the thread until stopped."""
        self._link.run(self._work, self._fail)

    def look_again(self) -> None:
        """Notes that another connection was lost: Redis may have restarted since the last entry."""
        self._note_loss()
        self._look_again = True
        self._outbox.wake()

    def put_back(self, payloads: Sequence[bytes]) -> None:
        """Appends entries, ours or others', that Redis has lost."""
        self._returned.extend(payloads)
        self._outbox.wake()

    def _fail(self) -> None:
        self._note_loss()
        self._client = None

    def _note_loss(self) -> None:
        if self._lost is None:
            self._lost = time.monotonic()

    def _work(self, client: Any) -> None:
        """Sends a batch, or waits a while for one."""
        if client is not self._client or self._look_again:
            self._look_again = False
            self._find_what_may_be_lost(client)
            self._client = client
            if not self._unsent:  # else only sending shows that the connection works
                self._link.worked()
        taken = [] if self._unsent else self._outbox.take(_RUNS, _TOKENS, timeout=1.0)
        try:
            self._unsent.extend(self._encoder.encode(taken))
            while self._returned:
                self._unsent.appendleft(self._returned.popleft())
                self._again += 1
            try:
                self._send(client)
            finally:  # after an error both are sent later
                if taken:
                    self._unsent.extend(self._encode_learned(taken))
        finally:
            self._outbox.finish(len(taken))
        self._send(client)

    def _encode_learned(self, taken: Sequence[Run]) -> list[bytes]:
        """Entries with the rows of sent texts, and with a calibration that waits."""
        found = self._encoder.rows(taken)
        if self._outbox.calibration:
            calibration, self._outbox.calibration = self._outbox.calibration, b""
            found.append(self._encoder.calibration(calibration))
        return found

    def _send(self, client: Any) -> None:
        """Sends unsent entries, in pipelines; raises Redis' answer to the first one it refused."""
        while self._unsent and not self._stopped.is_set():
            batch = [self._unsent[index] for index in range(min(_RUNS, len(self._unsent)))]
            tokens = sum(map(len, batch)) // 4
            self._stopped.wait(self._rate.wait(tokens, time.monotonic()))
            pipe = client.pipeline(transaction=False)
            for payload in batch:
                pipe.xadd(self._key, {FIELD: payload})
            replies = pipe.execute(raise_on_error=False)
            now = time.monotonic()
            for reply in replies:
                if isinstance(reply, Exception):
                    if "exhausted" in str(reply):
                        client.eval(_REVIVE, 1, self._key)
                    elif str(reply).startswith(("WRONGTYPE", "Operation against a key")):
                        self._keys.rotate(-1)
                    raise reply  # and the entry is sent again
                self._accept(now)
                self._last_seconds = stream_id(reply)[0] / 1000
            self._link.worked()
            self._trim(client)

    def _accept(self, now: float) -> None:
        payload = self._unsent.popleft()
        if self._again:
            self._again -= 1
            self._counts.resent += 1
        elif holds_text(payload):
            self._counts.sent += 1
        else:
            self._counts.sent_learned += 1
        self._kept.append((now, payload))
        self._kept_bytes += len(payload)
        while self._kept[0][0] < now - self._keep_seconds or self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft()[1])
            if not self._kept:
                break

    def _find_what_may_be_lost(self, client: Any) -> None:
        """Queues recently accepted entries again where another Redis answers than the one that took them."""
        run = server_run(client, self._is_cluster)
        lost, self._lost = self._lost, None
        if lost is None or (run is not None and self._run == run):
            self._run = run
            return
        self._run = run
        again = [payload for accepted, payload in self._kept if accepted >= lost - self._keep_seconds]
        self._again += len(again)
        self._unsent.extendleft(reversed(again))
        self._kept.clear()
        self._kept_bytes = 0

    def _trim(self, client: Any) -> None:
        """Trims the stream to its cap and age limit, at intervals.

        Entries that are too old by one clock only stay: ids are of Redis' clock, and either may be wrong by
        days.
        """
        if time.monotonic() - self._trimmed < _TRIM_SECONDS:
            return
        self._trimmed = time.monotonic()
        seconds = min(float(time.time()), self._redis_seconds(client))
        oldest = max(0, int(1000 * seconds) - self._keep_ms)
        try:
            client.xtrim(self._key, minid=oldest, approximate=True)
            if not self._measures:
                return
            used = client.memory_usage(self._key)
            if used is not None and used > self._stream_bytes:
                length = int(client.xlen(self._key) * 0.9 * self._stream_bytes / used)
                client.xtrim(self._key, maxlen=length, approximate=True)
        except NoPermissionError:
            self._measures = False
        except ResponseError:
            pass

    def _redis_seconds(self, client: Any) -> float:
        """The clock of Redis, in seconds; of a cluster that of the slowest node.

        Without permission for TIME, the time in the id of the last entry.
        """
        try:
            found = client.time()
        except NoPermissionError:
            return self._last_seconds
        clocks = found.values() if isinstance(found, dict) else (found,)
        return min(float(seconds) for seconds, _ in clocks)
