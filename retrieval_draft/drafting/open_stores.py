"""Opening of datastores, and the check that they belong to the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_draft.config import DraftConfig
from retrieval_draft.errors import InvalidInputError, TokenizerMismatchError
from retrieval_draft.index.corpus import Corpus
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.phrase_files import read_phrases
from retrieval_draft.index.phrases import PhraseTable
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.store import SharedStore
from retrieval_draft.models.fingerprint import tokenizer_fingerprint, vocabulary_size

__all__ = ["open_draft_stores"]


def open_draft_stores(
    tokenizer: Any,
    vocabulary: int,
    config: DraftConfig,
    corpora: Sequence[Any] | str | Path,
    phrases: Any,
    store: Any = None,
) -> DraftStores:
    """Opens corpora, phrases and store, and checks that their ids are the tokenizer's.

    Args:
        tokenizer: The model's; None only where nothing here needs one.
        vocabulary: Rows of the model's embedding.
        config: The drafting configuration; its history may be on disk.
        corpora: Folders or opened `Corpus` objects; one or several.
        phrases: A file, or texts, or a table of their tokens; None for none.
        store: A URL, a `StoreConfig` or an opened `SharedStore`; None for none. The call does not wait for
            its connection.

    Raises:
        InvalidInputError: Something needs a tokenizer and there is none.
        DatastoreError: A corpus is missing or torn.
        TokenizerMismatchError: A corpus, or the opened store, belongs to another tokenizer.
    """
    if isinstance(corpora, (str, Path, Corpus)):
        corpora = (corpora,)
    if tokenizer is None:
        given = {"corpora": bool(corpora), "phrases": phrases is not None, "store": store is not None}
        if any(given.values()):
            name = next(name for name in given if given[name])
            raise InvalidInputError(
                f"{name} needs the model's tokenizer.", "Pass it to RetrievalDrafter.for_model."
            )
        return DraftStores(vocabulary)
    fingerprint = ""
    if corpora or config.history_folder is not None or store is not None:
        fingerprint = tokenizer_fingerprint(tokenizer)
    opened = []
    for corpus in corpora:
        found = corpus if isinstance(corpus, Corpus) else Corpus.open(corpus)
        found.folder.check(fingerprint, vocabulary_size(tokenizer))
        opened.append(found)
    table = None if phrases is None else _phrases(phrases, tokenizer)
    shared = None if store is None else _shared(store, fingerprint, vocabulary_size(tokenizer))
    owned = not isinstance(store, SharedStore)
    return DraftStores(vocabulary, fingerprint, tuple(opened), table, shared, owned)


def _shared(store: Any, fingerprint: str, vocabulary: int) -> SharedStore:
    if isinstance(store, str):
        store = StoreConfig(store)
    if isinstance(store, StoreConfig):
        return SharedStore(store, fingerprint, vocabulary)
    if not isinstance(store, SharedStore):
        raise InvalidInputError(
            f"store is a {type(store).__name__}.", "Pass a URL, a StoreConfig or a SharedStore."
        )
    if (store.fingerprint, store.vocabulary) != (fingerprint, vocabulary):
        raise TokenizerMismatchError(
            f"The store is for a tokenizer of fingerprint {store.fingerprint} and {store.vocabulary} ids; "
            f"this one has fingerprint {fingerprint} and {vocabulary} ids.",
            "Open a store for each tokenizer.",
        )
    return store


def _phrases(phrases: Any, tokenizer: Any) -> PhraseTable:
    if isinstance(phrases, PhraseTable):
        return phrases
    texts = read_phrases(Path(phrases)) if isinstance(phrases, (str, Path)) else list(phrases)
    if not all(isinstance(text, str) for text in texts):
        raise InvalidInputError("phrases is a list of something else than texts.", "Pass a file, or texts.")
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return PhraseTable([np.array(each, np.int32) for each in ids])
