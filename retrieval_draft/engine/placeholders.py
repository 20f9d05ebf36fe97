"""Ids that stand for images, sound and video in a text, and the text between them."""

from __future__ import annotations

from typing import Any

import numpy as np

from retrieval_draft.index.source import TokenArray

__all__ = ["ID_LIMIT", "placeholder_ids", "takes_media", "text_runs"]

_ENDINGS = ("_token_id", "_token_ids", "_token_index")
ID_LIMIT = 1 << 31
"""Ids are int32: a text holds none above."""

_OF_TEXT = {"bos", "eos", "pad", "sep", "unk", "cls", "mask", "decoder_start", "forced_bos", "forced_eos"}
"""Names of ids that belong to text, such as ``eos_token_id``, without their endings."""


def takes_media(model: Any) -> bool:
    """True if a model of transformers reads images, sound or video beside text."""
    kinds = model.input_modalities
    named = {kinds} if isinstance(kinds, str) else set(kinds)
    # A language model alone may have the kinds of its family, and not every family names them.
    parts = getattr(model.config, "sub_configs", {})
    return (named != {"text"} and len(parts) > 0) or model.config.get_text_config(
        decoder=True
    ) is not model.config


def placeholder_ids(config: Any) -> frozenset[int]:
    """Ids that the configuration of a model with images names, such as ``image_token_id``; none of text."""
    found: set[int] = set()
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        for name in dir(part):  # some are properties
            stem = next((name.removesuffix(end) for end in _ENDINGS if name.endswith(end)), "_")
            if stem not in _OF_TEXT and not stem.startswith("_"):
                value = getattr(part, name, None)
                values = value if isinstance(value, (list, tuple)) else [value]
                found.update(each for each in values if type(each) is int and 0 <= each < ID_LIMIT)
    return frozenset(found)


def text_runs(tokens: TokenArray, placeholders: frozenset[int]) -> list[TokenArray]:
    """The text between placeholders.

    Args:
        tokens: int32, shape (length,).
        placeholders: Ids that are no text.

    Returns:
        Views of `tokens`, int32 each. The first and the last are the text at its ends, and may be empty; the
        others are not. One without placeholders is both.

    Example:
        tokens [5, 6, 99, 99, 7, 99], placeholders {99}  ->  [[5, 6], [7], []]
    """
    if not placeholders:
        return [tokens]
    found = np.flatnonzero(np.isin(tokens, np.fromiter(placeholders, np.int32)))
    if not len(found):
        return [tokens]
    begins, ends = [0, *(found + 1).tolist()], [*found.tolist(), len(tokens)]
    first, *between, last = (tokens[begin:end] for begin, end in zip(begins, ends, strict=True))
    return [first, *filter(len, between), last]
