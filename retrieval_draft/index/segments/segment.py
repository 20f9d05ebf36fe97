"""An immutable, suffix-sorted run of texts, in memory or memory-mapped from a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._files import file_checksum
from retrieval_draft.errors import DatastoreError, InvalidInputError
from retrieval_draft.index._kernels.sizes import STRIDE
from retrieval_draft.index.segments.suffix_sort import key_bits, sort_suffixes
from retrieval_draft.index.source import TokenArray

__all__ = ["MAX_TOKENS", "Segment", "text_dtype"]

MAX_TOKENS = 2**31 - 2**20
"""Positions are int32."""

_BROKEN = "Build the index again, or restore the file from a copy."
_FILES = ("tokens", "suffixes", "documents", "samples")


class Segment:
    """Texts with their suffix array.

    Attributes:
        tokens: uint16 or uint32, shape (n,). Texts one after the other, a separator after each.
        suffixes: int32, shape (n - texts,). Positions of tokens, ordered by the text from there on.
        documents: int32, shape (texts,). Start index of each text.
        samples: uint64, shape (samples,). Keys of every 128th suffix.
        separator: The value between texts; no token of them.
        row: int64, shape (SEGMENT_FIELDS,). Sizes and addresses for kernels: keep the segment while they run.

    Example:
        texts 7 8 9 and 7 8 5: tokens 7 8 9 S 7 8 5 S, suffixes 6 4 0 5 1 2, documents 0 4;
        count([7, 8]) is 2, count([9, 7]) is 0: matches stop at the end of a text
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        suffixes: NDArray[np.int32],
        documents: NDArray[np.int32],
        samples: NDArray[np.uint64],
        separator: int,
        bits: int,
    ) -> None:
        self.tokens = tokens
        self.suffixes = suffixes
        self.documents = documents
        self.samples = samples
        self.separator = separator
        self.bits = bits
        self.row = self._row()

    @classmethod
    def build(cls, texts: Sequence[TokenArray], vocabulary: int, threads: int = 1) -> Segment:
        """Sorts texts into a segment.

        Args:
            texts: int32, shape (length,) each; empty ones are left out.
            vocabulary: Number of token ids.
            threads: Workers that sort.

        Raises:
            InvalidInputError: An id is negative or not below `vocabulary`, or there are too many tokens.
        """
        texts = [text for text in texts if len(text)]
        length = sum(len(text) + 1 for text in texts)
        if length > MAX_TOKENS:
            raise InvalidInputError(
                f"A segment of {length} tokens is too long; at most {MAX_TOKENS} fit.", "Make several."
            )
        joined = np.full(length, vocabulary, text_dtype(vocabulary))
        documents = np.empty(len(texts), np.int32)
        start = 0
        for number, text in enumerate(texts):
            _check_ids(int(text.min()), int(text.max()), vocabulary)
            documents[number] = start
            joined[start : start + len(text)] = text
            start += len(text) + 1
        return cls.join(joined, documents, vocabulary, threads)

    @classmethod
    def join(
        cls, joined: NDArray[Any], documents: NDArray[np.int32], vocabulary: int, threads: int = 1
    ) -> Segment:
        """Sorts texts that are in one array already into a segment.

        Args:
            joined: `text_dtype`, shape (n,). The value `vocabulary` after each text. The segment keeps the
                array.
            documents: int32, shape (texts,). Start index of each text.
            vocabulary: Number of token ids.
            threads: Workers that sort.
        """
        _check_ids(0, int(joined.max(initial=0)), vocabulary + 1)
        if len(joined) and joined[-1] != vocabulary:
            raise InvalidInputError(
                f"The texts of a segment end in {joined[-1]}; expected the separator {vocabulary}.",
                "Build the index that they come from again.",
            )
        separator, tokens = vocabulary, joined
        if vocabulary == 2**16:  # all values of 16 bits are ids, but hardly a segment has all of them
            free = np.flatnonzero(np.bincount(joined, minlength=2**16)[: 2**16] == 0)
            if len(free):
                separator = int(free[-1])
                tokens = np.where(joined == vocabulary, separator, joined).astype(np.uint16)
        bits = key_bits(separator, separator if tokens.dtype == np.uint32 else 0)
        suffixes = sort_suffixes(tokens, separator, bits, threads)
        segment = cls(tokens, suffixes, documents, np.empty(0, np.uint64), separator, bits)
        segment._sample()
        return segment

    @classmethod
    def open(cls, folder: Path, separator: int, bits: int, sizes: dict[str, int]) -> Segment:
        """Maps a segment that `write` made. Reads nothing but the headers.

        All that kernels rely on is checked: dtypes, shapes, lengths, the manifest's numbers. Values in the
        arrays are not checked; kernels bound every read by them.

        Args:
            folder: The segment's folder.
            separator: From the manifest, as is `bits`.
            bits: Bits of a token in a key.
            sizes: Expected bytes of each file, by its name.

        Raises:
            DatastoreError: A file is missing, torn, or not an array of the kind expected, or a number does
                not match the arrays.
        """
        tokens, suffixes, documents, samples = (
            map_array(folder / f"{name}.npy", sizes.get(f"{name}.npy", -1)) for name in _FILES
        )
        kinds = {
            "tokens": (tokens, (np.uint16, np.uint32), len(tokens)),
            "suffixes": (suffixes, (np.int32,), len(tokens) - len(documents)),
            "documents": (documents, (np.int32,), len(documents)),
            "samples": (samples, (np.uint64,), -(-len(suffixes) // STRIDE)),
        }
        for name, (array, dtypes, length) in kinds.items():
            if array.dtype not in dtypes or array.shape != (length,) or len(array) > MAX_TOKENS:
                raise DatastoreError(
                    f"{folder / name}.npy holds {array.dtype} of shape {array.shape}; expected "
                    f"{' or '.join(np.dtype(kind).name for kind in dtypes)} of shape ({length},).",
                    _BROKEN,
                )
        largest = int(np.iinfo(tokens.dtype).max)
        fitting = key_bits(separator, separator if tokens.dtype == np.uint32 else 0)
        if not 0 <= separator <= largest or bits != fitting:
            raise DatastoreError(
                f"The manifest says that {folder} has the separator {separator} and {bits} bits for a "
                f"token; {tokens.dtype} has separators of 0..{largest}, and this one takes {fitting} bits.",
                _BROKEN,
            )
        return cls(tokens, suffixes, documents, samples, separator, bits)

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Writes the arrays into a new folder and syncs them.

        Returns:
            For each file its bytes and xxh3 checksum, for the manifest.
        """
        folder.mkdir()
        files: dict[str, dict[str, Any]] = {}
        for name in _FILES:
            path = folder / f"{name}.npy"
            save_array(path, getattr(self, name))
            files[path.name] = {"bytes": path.stat().st_size, "xxh3": file_checksum(path)}
        return files

    @property
    def num_documents(self) -> int:
        """Texts."""
        return len(self.documents)

    @property
    def num_tokens(self) -> int:
        """Tokens, separators not counted."""
        return len(self.suffixes)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, mapped or not."""
        return sum(int(getattr(self, name).nbytes) for name in _FILES)

    def texts(self, vocabulary: int) -> NDArray[Any]:
        """All texts as `join` takes them, `vocabulary` after each; may be the segment's own array."""
        if self.separator == vocabulary:
            return self.tokens
        joined = self.tokens.astype(text_dtype(vocabulary))
        joined[self.tokens == self.separator] = vocabulary
        return joined

    def count(self, context: TokenArray) -> int:
        """Number of occurrences of `context`: int32, 1 to 32 tokens."""
        return self._find(context)[0]

    def followers(self, context: TokenArray, most: int = 1 << 20) -> dict[int, int]:
        """Counts of the tokens after `context`; from a sample where it occurs more than `most` times.

        Args:
            context: int32, shape (length,), 1 to 32 tokens.
            most: Occurrences to read.

        Returns:
            Next token to count.

        Example:
            texts 7 8 9 and 7 8 5: followers([7, 8])  ->  {5: 1, 9: 1}
        """
        count, first, is_single = self._find(context)
        if is_single:
            positions = np.array([first], np.int64)
        else:
            ranks = first + np.linspace(0, count, min(count, most), endpoint=False).astype(np.int64)
            positions = self.suffixes[ranks].astype(np.int64)
        positions += len(context)
        inside = (positions >= 0) & (
            positions < len(self.tokens)
        )  # a suffix array may have been altered on disk
        following = self.tokens[positions[inside]]
        values, counts = np.unique(following[following != self.separator], return_counts=True)
        return {int(value): int(number) for value, number in zip(values, counts, strict=True)}

    def _find(self, context: TokenArray) -> tuple[int, int, bool]:
        """Occurrences of a context; the first one's rank or the only one's position; True for a position."""
        from retrieval_draft.index._kernels import segment_match as kernels

        chain, longest, tail = match_state(1)
        rows = self.row[None]
        kernels.advance(rows, chain, longest, tail, np.array(context, np.int32))
        count = int(kernels.occurrences(rows, 0, chain, longest, tail, len(context)))
        first, last = (int(value) for value in chain[0, len(context)])
        return count, first, last == kernels.SINGLE

    def _sample(self) -> None:
        from retrieval_draft.index._kernels import segment_match as kernels

        self.samples = np.empty(-(-len(self.suffixes) // STRIDE), np.uint64)
        self.row = self._row()
        kernels.sample_keys(self.row[None], 0, self.samples)

    def _row(self) -> NDArray[np.int64]:
        row = (
            self.tokens.ctypes.data,
            len(self.tokens),
            self.tokens.dtype.itemsize,
            self.separator,
            self.suffixes.ctypes.data,
            len(self.suffixes),
            self.samples.ctypes.data,
            len(self.samples),
            self.bits,
        )
        return np.array(row, np.int64)


def map_array(path: Path, nbytes: int | None = None) -> NDArray[Any]:
    """Maps a .npy file of one axis. Reads the header.

    Args:
        path: The file.
        nbytes: The size it must have; None for any.

    Raises:
        DatastoreError: It is missing, torn, or no such array; objects are refused.
    """
    try:
        found = path.stat().st_size
        array: NDArray[Any] | None = None
        if nbytes is None or found == nbytes:
            array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy evaluates the header as Python, which can raise anything
        raise DatastoreError(f"{path} cannot be read: {error or type(error).__name__}.", _BROKEN) from error
    if array is None:
        raise DatastoreError(f"{path} is torn: found {found} bytes, expected {nbytes}.", _BROKEN)
    if array.ndim != 1:
        raise DatastoreError(f"{path} holds an array of shape {array.shape}; expected one axis.", _BROKEN)
    return array


def match_state(segments: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Chain, longest and tail of an empty text, for `segment_match.advance`."""
    from retrieval_draft.index._kernels.segment_match import LONGEST

    chain = np.zeros((segments, LONGEST + 1, 2), np.int32)
    return chain, np.zeros(segments, np.int32), np.full(LONGEST, -1, np.int32)


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Writes an array of any shape and dtype but objects as a .npy file, and syncs it to disk."""
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def text_dtype(vocabulary: int) -> type[np.uint16] | type[np.uint32]:
    """Smallest dtype for ids below `vocabulary`, and for `vocabulary` itself between texts."""
    return np.uint16 if vocabulary < 2**16 else np.uint32


def _check_ids(smallest: int, largest: int, vocabulary: int) -> None:
    if smallest < 0 or largest >= vocabulary:
        raise InvalidInputError(
            f"A text holds the token id {smallest if smallest < 0 else largest}; ids must lie in "
            f"0..{vocabulary - 1}.",
            "Use the tokenizer that the datastore is for.",
        )
