"""Options of drafting in vLLM: environment before file before default."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from retrieval_draft._files import expanded
from retrieval_draft.config import SOURCES, DraftConfig
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.store.config import SHARES, StoreConfig

__all__ = ["PREFIX", "VllmOptions"]

PREFIX = "RETRIEVAL_DRAFT_"

_LISTS = ("index", "sources")


class VllmOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of `RetrievalProposer`; ``RETRIEVAL_DRAFT_INDEX`` in the environment is `index`, and so on.

    Attributes:
        index: Corpus indexes to draft from; in the environment separated as ``PATH`` is.
        phrases: A file of fixed texts, one a line.
        store: Store that servers share: ``redis://host:6379``, ``embedded://FOLDER``, ...
        tenant: Servers of one tenant share with each other.
        share: Parts of each request that the others may learn: "none", "reply" or "all".
        snapshots: Storage of the store's snapshots: a folder or a URL.
        history_folder: Folder of earlier requests' texts, for use after a restart.
        history_bytes: Limit of that text's memory.
        sources: Draft sources by name; in the environment separated by commas.
        min_prob: Smallest probability that all of a draft is accepted; longer drafts are cut.
        costs: "learned" to draft only as far as it pays by the measured time of steps, "ignored" to draft as
            far as `min_prob` allows.
        threads: Number that propose at once, in batches of 16 rows or more.
        idle_seconds: Time without a step after which running requests count as finished.
    """

    index: tuple[str, ...] = ()
    phrases: str | None = None
    store: str | None = None
    tenant: str = "default"
    share: str = "reply"
    snapshots: str | None = None
    history_folder: str | None = None
    history_bytes: Annotated[int, msgspec.Meta(ge=1 << 20, le=1 << 40)] = 1 << 28
    sources: tuple[str, ...] = tuple(SOURCES)
    min_prob: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.05
    costs: Literal["learned", "ignored"] = "learned"
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    idle_seconds: Annotated[float, msgspec.Meta(gt=0.0, le=86400.0)] = 5.0

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> VllmOptions:
        """Reads the environment, and the file that ``RETRIEVAL_DRAFT_CONFIG`` names, TOML or JSON.

        An empty variable counts as unset.

        Args:
            environment: None for the process's own.

        Raises:
            InvalidInputError: Names the variable or the file's entry, its value, and the allowed ones.
        """
        found = os.environ if environment is None else environment
        named = found.get(f"{PREFIX}CONFIG")
        values = {} if not named else _file(expanded(named))
        _convert(cls, values, f"{named}: ")
        for name in cls.__struct_fields__:
            text = found.get(PREFIX + name.upper())
            if text:
                value: Any = text
                if name in _LISTS:
                    parts = text.split("," if name == "sources" else os.pathsep)
                    value = [part.strip() for part in parts if part.strip()]
                _convert(cls, {name: value}, f"{PREFIX}{name.upper()}: ")
                values[name] = value
        options = _convert(cls, values, "")
        options.draft_config()
        options.store_config()
        return options

    def draft_config(self) -> DraftConfig:
        """These options as a `DraftConfig`."""
        return DraftConfig(
            sources=self.sources, history_bytes=self.history_bytes, history_folder=self.history_folder
        )

    def store_config(self) -> StoreConfig | None:
        """These options as a `StoreConfig`; None without a store."""
        if self.share not in SHARES:
            raise InvalidInputError(f"{PREFIX}SHARE is {self.share!r}.", f"Choose from: {', '.join(SHARES)}.")
        if self.store is None:
            return None
        return StoreConfig(self.store, tenant=self.tenant, share=self.share, snapshots=self.snapshots)

    @property
    def needs_tokenizer(self) -> bool:
        """True if text is saved, shared or read from elsewhere, which is checked against the tokenizer."""
        return any((self.index, self.phrases, self.store, self.history_folder))


def _convert(cls: type[VllmOptions], values: Mapping[str, Any], where: str) -> VllmOptions:
    try:
        return msgspec.convert(values, cls, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidInputError(
            f"{where}{error}.", f"Options: {', '.join(cls.__struct_fields__)}; see docs/vllm.md."
        ) from error


def _file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else _toml(text)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{PREFIX}CONFIG names {path}, which cannot be read: {error}.",
            "Write TOML, or JSON in a .json file.",
        ) from error
    if not isinstance(values, dict):
        raise InvalidInputError(f"{path} holds a {type(values).__name__}.", "Write one table of options.")
    return values


def _toml(text: str) -> Any:
    try:
        tomllib = importlib.import_module("tomllib")
    except ModuleNotFoundError as error:
        raise ValueError("TOML needs Python 3.11") from error
    return tomllib.loads(text)
