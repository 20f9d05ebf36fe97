"""An entry of the shared log: a token run or what was learned, its sender, and a signature."""

from __future__ import annotations

import hashlib
import hmac
import time

import msgspec
import numpy as np

from retrieval_draft.index.source import TokenArray

__all__ = ["FORMAT_VERSION", "LEARNED_VERSION", "Entry", "EntryCodec", "RejectedEntryError", "holds_text"]

FORMAT_VERSION = 1
"""Version of an entry with a token run, which all releases read."""

LEARNED_VERSION = 2
"""Version of an entry with what was learned: releases that do not know it drop it, and count it."""

ID_BYTES = 16
_MOST = 2**63
_VERSIONS = (FORMAT_VERSION, LEARNED_VERSION)


class Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """An entry of the log, as a MessagePack array.

    Attributes:
        version: Of the format.
        namespace: Tokenizer fingerprint and tenant, ``fingerprint:tenant``.
        server: 16 bytes that a server draws when it starts.
        sequence: The server's entries count up from 0. With `server` it identifies an entry.
        created: Milliseconds since the epoch, by the server's clock.
        tokens: The run, uint32, little-endian; of version 2 what `pack_learned` makes.
        signature: HMAC-SHA256 of the entry without it; empty where there is no key.
    """

    version: int
    namespace: str
    server: bytes
    sequence: int
    created: int
    tokens: bytes
    signature: bytes = b""


class RejectedEntryError(Exception):
    """An entry that this reader drops. Never raised outside this package.

    Args:
        reason: The counted reason, one of `REASONS`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def holds_text(payload: bytes) -> bool:
    """True if an entry of `EntryCodec` holds a token run."""
    return payload[1] == FORMAT_VERSION  # the first number of the array


class EntryCodec:
    """Writes and reads the entries of one namespace.

    Args:
        namespace: ``fingerprint:tenant``.
        key: With one, entries are signed, and those that are not are rejected.
        max_tokens: Of a run.

    Attributes:
        fingerprint: Of the tokenizer.
        most_bytes: Of an entry; a longer one is none.

    Example:
        encode(server, 0, [7, 8]) is the array [1, "fingerprint:tenant", server, 0, 1763972285000,
        07 00 00 00 08 00 00 00, ""]
    """

    def __init__(self, namespace: str, key: str | bytes | None, max_tokens: int) -> None:
        self._namespace = namespace
        self.fingerprint = namespace.partition(":")[0]
        self._key = key.encode() if isinstance(key, str) else key
        self._max_bytes = 4 * max_tokens
        self.most_bytes = self._max_bytes + len(namespace.encode()) + 256
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Entry)

    def encode(self, server: bytes, sequence: int, tokens: TokenArray) -> bytes:
        """Encodes one entry.

        Args:
            server: Id of the sender.
            sequence: Number of entries it sent before.
            tokens: int32, shape (length,), ids of 0 and above.
        """
        return self._encode(FORMAT_VERSION, server, sequence, np.asarray(tokens).astype("<u4").tobytes())

    def encode_learned(self, server: bytes, sequence: int, packed: bytes) -> bytes:
        """Encodes one entry with what was learned.

        Args:
            server: Id of the sender, another one than for runs: their numbers have no gaps where this is not
                read.
            sequence: Number of such entries it sent before.
            packed: From `pack_learned`.
        """
        return self._encode(LEARNED_VERSION, server, sequence, packed)

    def _encode(self, version: int, server: bytes, sequence: int, content: bytes) -> bytes:
        created = time.time_ns() // 1_000_000
        entry = Entry(version, self._namespace, server, sequence, created, content)
        if self._key is not None:
            entry = msgspec.structs.replace(entry, signature=self._sign(entry))
        return self._encoder.encode(entry)

    def decode(self, payload: object) -> Entry:
        """Reads an entry and checks all that does not depend on other entries.

        Args:
            payload: The value from the log.

        Raises:
            RejectedEntryError: It is malformed, of another format version or namespace, too long, unsigned or
                altered.
        """
        if not isinstance(payload, bytes):
            raise RejectedEntryError("malformed")
        if len(payload) > self.most_bytes:
            raise RejectedEntryError("length")
        try:
            entry = self._decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RejectedEntryError(self._misfit(payload)) from error
        if entry.version not in _VERSIONS:
            raise RejectedEntryError("version")
        if entry.namespace != self._namespace:
            raise RejectedEntryError("namespace")
        if self._key is not None:
            if not entry.signature:
                raise RejectedEntryError("unsigned")
            if not hmac.compare_digest(entry.signature, self._sign(entry)):
                raise RejectedEntryError("altered")
        size = len(entry.tokens)
        if size > self._max_bytes:
            raise RejectedEntryError("length")
        odd = size % 4 and entry.version == FORMAT_VERSION
        if not size or odd or len(entry.server) != ID_BYTES or not 0 <= entry.sequence < _MOST:
            raise RejectedEntryError("malformed")
        return entry

    def _sign(self, entry: Entry) -> bytes:
        assert self._key is not None
        unsigned = self._encoder.encode(msgspec.structs.replace(entry, signature=b""))
        return hmac.digest(self._key, unsigned, hashlib.sha256)

    def _misfit(self, payload: bytes) -> str:
        """Reason that an entry cannot be decoded: another version may have other fields."""
        try:
            found = msgspec.msgpack.decode(payload)
        except (
            msgspec.DecodeError,
            UnicodeDecodeError,
            RecursionError,
            ValueError,
            OverflowError,
            TypeError,
        ):
            return "malformed"
        if isinstance(found, list) and found and type(found[0]) is int and found[0] not in _VERSIONS:
            return "version"
        return "malformed"
