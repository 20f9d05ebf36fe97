"""What stands in a saved drafter's description."""

from __future__ import annotations

from typing import Any

import msgspec

from retrieval_draft.config import DraftConfig

__all__ = ["FORMAT", "FORMAT_VERSION", "SavedCosts", "SavedDrafter", "SavedStore"]

FORMAT = "retrieval_draft drafter"
FORMAT_VERSION = 1


class SavedStore(msgspec.Struct):
    """Where servers share, without what only its users may know.

    Attributes:
        url: Without user and password.
        snapshots: A folder or URL, likewise.
        signed: Whether there was a key, which whoever loads this must bring.
        options: The other fields of `StoreConfig`.
    """

    url: str
    snapshots: str | None
    signed: bool
    options: dict[str, Any]


class SavedCosts(msgspec.Struct):
    """Measured seconds of a forward pass by number of tokens, and the machine and model they are of."""

    situation: dict[str, str]
    seconds: dict[int, float]


class SavedDrafter(msgspec.Struct, kw_only=True):
    """The description of a drafter. It may be edited by hand.

    Attributes:
        format: What kind of file this is.
        format_version: Of the file.
        library_version: What wrote it.
        created: When, UTC.
        vocabulary: Rows of the model's embedding.
        fingerprint: Of the tokenizer; empty without one.
        tokens: How many ids the tokenizer has.
        config: How to draft.
        corpora: Index folders; relative ones lie in this folder.
        phrases: Token ids of the fixed texts; null for none.
        store: What servers share; null for nothing.
        draft_models: How many draft models there were; they are not kept.
        calibration: File and checksum (xxh3, 128 bits); null where nothing was drafted yet.
        costs: null where nothing was measured yet.
    """

    format: str
    format_version: int
    library_version: str
    created: str
    vocabulary: int
    fingerprint: str
    tokens: int
    config: DraftConfig
    corpora: list[str]
    phrases: list[list[int]] | None
    store: SavedStore | None
    draft_models: int
    calibration: tuple[str, str] | None
    costs: SavedCosts | None
