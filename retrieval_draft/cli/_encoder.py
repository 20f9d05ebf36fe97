"""Tokenizers by the names of users and indexes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retrieval_draft._files import expanded
from retrieval_draft.errors import InvalidInputError

if TYPE_CHECKING:
    from retrieval_draft.index.build.encoder import Encoder
    from retrieval_draft.index.segments.index_folder import IndexFolder

__all__ = ["load_encoder", "named_tokenizer"]


def load_encoder(name: str) -> Encoder:
    """The tokenizer that a user names: a tokenizer.json, a model's folder, or a hub name."""
    from retrieval_draft.index.build.encoder import Encoder

    path = expanded(name)
    if path.is_file():
        return Encoder.from_file(path)
    from retrieval_draft.models.loading import load_tokenizer

    return Encoder(load_tokenizer(name), name)


def named_tokenizer(index: IndexFolder) -> str:
    """Name of the tokenizer that an index was built with."""
    if not index.manifest.tokenizer:
        raise InvalidInputError(f"{index.path} does not say its tokenizer.", "Name it with --tokenizer.")
    return index.manifest.tokenizer
