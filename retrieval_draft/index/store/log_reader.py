"""Reads of streams without fetching items too long to be entries."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from retrieval_draft.index.store.log_replica import Item

__all__ = ["COUNT", "LogReader", "edge_ids"]

COUNT = 48
"""Entries of a read: parsing the answer holds the GIL."""

FEW = 4
"""Entries of a read where Redis is not asked for sizes first."""

_ROOM = 1 << 23
"""Bytes from which on a read is full."""

_WARY_SECONDS = 600.0
_POLL_SECONDS = 0.02
"""Seconds after an entry that was too long in which streams are polled, and the interval of polling, instead
of blocking reads."""

_READ = """
local out, room = {}, tonumber(ARGV[3])
for index, key in ipairs(KEYS) do
  local items, from, more = {}, '(' .. ARGV[3 + index], 0
  while #items < tonumber(ARGV[1]) do
    if room <= 0 then more = 1 break end
    local found = redis.pcall('XRANGE', key, from, '+', 'COUNT', 1)
    if found.err or not found[1] then break end
    local id, fields, size = found[1][1], found[1][2], 0
    for _, part in ipairs(fields) do size = size + #part end
    if size > tonumber(ARGV[2]) then fields = size room = 0 end
    items[#items + 1] = {id, fields}
    room = room - size
    from = '(' .. id
  end
  if #items == tonumber(ARGV[1]) then more = 1 end
  out[index] = {items, more}
end
return out
"""
"""For each stream the entries after a position: at most ARGV[1], of each its id and fields, or instead of
these its size where that is more than ARGV[2]; and whether there may be more. One entry at a time is held,
and after one that is too long no other is read in the same call."""

_LAST = """
local found = redis.call('XINFO', 'STREAM', KEYS[1])
for index = 1, #found, 2 do
  if found[index] == 'last-generated-id' then return found[index + 1] end
end
"""

_EDGES = """
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
return first[1] and last[1] and {first[1][1], last[1][1]} or {}
"""


class LogReader:
    """Reader of streams with one client.

    Redis sends whole entries of any size, chosen by the writer. So a script checks the size of each and sends
    only those that may be valid. Where scripts are not permitted a few entries are read at a time.

    Args:
        client: Of redis-py.
        most: Largest size of a valid entry in bytes.
    """

    def __init__(self, client: Any, most: int) -> None:
        self._client = client
        self._most = most
        self._scripts = True
        self._wary_until = 0.0
        for command in ("XREAD", "XINFO STREAM"):
            client.set_response_callback(command, _as_it_comes)

    def read(self, starts: Mapping[bytes, bytes]) -> tuple[list[tuple[bytes, list[Item]]], bool]:
        """Entries after the given positions, without waiting.

        Args:
            starts: For each stream the id after which to read.

        Returns:
            Streams with new entries, these entries, and whether any may have more.
        """
        if self._scripts:
            room = max(_ROOM, self._most)
            try:
                reply = self._client.eval(
                    _READ, len(starts), *starts, COUNT, self._most, room, *starts.values()
                )
            except NoPermissionError:
                self._scripts = False
            else:
                pairs = zip(starts, reply, strict=True)
                found = [(key, items) for key, (items, _) in pairs if items]
                if any(isinstance(item[1], int) for _, items in found for item in items):
                    self._wary_until = time.monotonic() + _WARY_SECONDS
                return found, any(more for _, more in reply)
        found = _streams(self._client.xread(starts, count=FEW))
        return found, any(len(items) == FEW for _, items in found)

    def wait(self, starts: Mapping[bytes, bytes], seconds: float) -> list[tuple[bytes, list[Item]]]:
        """Waits for the next entry, at most `seconds`. Everything before must have been read.

        A blocking read returns entries whole: one at a time, and after one that was too long none for a
        while.
        """
        end = time.monotonic() + seconds
        while self._scripts and time.monotonic() < self._wary_until:
            found, _ = self.read(starts)
            if found or time.monotonic() > end:
                return found
            time.sleep(_POLL_SECONDS)
        try:
            found = _streams(self._client.xread(starts, count=1, block=int(1000 * seconds)))
        except ResponseError as error:
            if not _is_other(error):
                raise
            time.sleep(_POLL_SECONDS)  # a key of another type must not block the other streams
            return []
        if any(_size(item) > self._most for _, items in found for item in items):
            self._wary_until = time.monotonic() + _WARY_SECONDS
        return found

    def last_id(self, key: bytes) -> bytes | None:
        """The last id that a stream assigned; 0-0 for a missing stream, None where it is not known."""
        try:
            if self._scripts:
                with suppress(NoPermissionError):  # of scripts; what they would call may be permitted
                    return bytes(self._client.eval(_LAST, 1, key))
            found = self._client.xinfo_stream(key)
            return bytes(found[found.index(b"last-generated-id") + 1])
        except NoPermissionError:
            return None
        except ResponseError as error:
            if "no such key" in str(error).lower():
                return b"0-0"
            if _is_other(error):
                return None
            raise


def _size(item: Item) -> int:
    """Bytes of an entry."""
    fields = item[1]
    parts = fields.values() if isinstance(fields, dict) else fields or ()
    return sum(len(part) for part in parts)


def edge_ids(client: Any, key: bytes) -> tuple[bytes, bytes] | None:
    """Ids of a stream's first and last entry; None where it has none."""
    try:
        found = client.eval(_EDGES, 1, key)
    except NoPermissionError:
        entries = [*client.xrange(key, count=1), *client.xrevrange(key, count=1)]
        found = [name for name, _ in entries]
    return (bytes(found[0]), bytes(found[1])) if len(found) == 2 else None


def _is_other(error: ResponseError) -> bool:
    """True if a key holds no stream."""
    return "wrongtype" in str(error).lower() or "wrong kind" in str(error).lower()


def _as_it_comes(reply: Any, **options: Any) -> Any:
    """Replaces redis-py's parsing, which holds the GIL for long."""
    return reply


def _streams(reply: Any) -> list[tuple[bytes, list[Item]]]:
    """Streams and their entries, from a reply in RESP2 or RESP3."""
    pairs: Sequence[Any] = list(reply.items()) if isinstance(reply, dict) else reply or ()
    return [(key, items) for key, items in pairs if items]
