"""Tests of the entries of the shared log."""

from contextlib import suppress

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_draft.index.store.entry import FORMAT_VERSION, EntryCodec, RejectedEntryError

SERVER = bytes(range(16))
RUN = np.array([0, 7, 65536, 2**31 - 1], np.int32)


def codec(key=None, namespace="f:t", most=8) -> EntryCodec:
    return EntryCodec(namespace, key, most)


def reason(payload, reader=None) -> str:
    with pytest.raises(RejectedEntryError) as caught:
        (reader or codec()).decode(payload)
    return caught.value.reason


def changed(payload: bytes, index: int, value) -> bytes:
    fields = msgspec.msgpack.decode(payload)
    fields[index] = value
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize("key", [None, "secret", b"secret"])
def test_what_is_written_is_read(key) -> None:
    entry = codec(key).decode(codec(key).encode(SERVER, 5, RUN))
    assert (entry.server, entry.sequence) == (SERVER, 5)
    assert np.frombuffer(entry.tokens, "<u4").tolist() == RUN.tolist()


def test_the_wire_format_stays() -> None:
    fields = msgspec.msgpack.decode(codec().encode(SERVER, 3, RUN[:2]))
    assert fields[:4] == [FORMAT_VERSION, "f:t", SERVER, 3]
    assert abs(fields[4] - 1_700_000_000_000) < 10**12  # milliseconds
    assert fields[5:] == [bytes([0, 0, 0, 0, 7, 0, 0, 0]), b""]


@pytest.mark.parametrize(
    ("index", "value", "expected"),
    [
        (0, 3, "version"),
        (0, "1", "malformed"),
        (1, "f:other", "namespace"),
        (2, b"short", "malformed"),
        (3, -1, "malformed"),
        (3, 2**63, "malformed"),
        (3, "3", "malformed"),
        (5, b"", "malformed"),
        (5, b"abc", "malformed"),
        (5, bytes(36), "length"),
        (5, bytes(5000), "length"),
    ],
)
def test_what_does_not_fit_is_rejected(index, value, expected) -> None:
    assert reason(changed(codec().encode(SERVER, 3, RUN), index, value)) == expected


def test_another_version_may_look_quite_different() -> None:
    assert reason(msgspec.msgpack.encode([7, {"tokens": 3}])) == "version"
    assert reason(msgspec.msgpack.encode({"version": 7})) == "malformed"
    assert reason(msgspec.msgpack.encode([])) == "malformed"
    assert reason(None) == "malformed"


def test_with_a_key_unsigned_and_altered_entries_are_rejected() -> None:
    signed = codec("secret")
    assert reason(codec().encode(SERVER, 3, RUN), signed) == "unsigned"
    assert reason(codec("other").encode(SERVER, 3, RUN), signed) == "altered"
    payload = signed.encode(SERVER, 3, RUN)
    for index, value in ((2, bytes(16)), (3, 4), (4, 1), (5, bytes(4)), (6, bytes(32))):
        assert reason(changed(payload, index, value), signed) == "altered"
    # A signed entry of another tenant is signed for that tenant.
    assert reason(codec("secret", "f:other").encode(SERVER, 3, RUN), signed) == "namespace"
    assert reason(changed(codec("secret", "f:other").encode(SERVER, 3, RUN), 1, "f:t"), signed) == "altered"
    assert codec().decode(payload).sequence == 3  # who has no key cannot check


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_reader(payload) -> None:
    for reader in (codec(), codec("secret")):
        with suppress(RejectedEntryError):
            reader.decode(payload)


@given(st.data())
def test_no_flipped_bit_passes_a_signature(data) -> None:
    payload = bytearray(codec("secret").encode(SERVER, 3, RUN))
    bit = data.draw(st.integers(0, len(payload) * 8 - 1))
    payload[bit // 8] ^= 1 << bit % 8
    reason(bytes(payload), codec("secret"))
