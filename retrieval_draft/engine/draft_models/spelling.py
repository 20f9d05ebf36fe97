"""Texts of draft paths in the tokens of the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.engine.draft_models.expansion import ModelTree
from retrieval_draft.engine.draft_models.vocabulary import token_bytes
from retrieval_draft.index.source import TokenArray

__all__ = ["Speller", "cut_off", "joined_tree"]

LOOK_BEHIND = 8
"""Tokens of the target before a draft, tokenized together with its text."""

_MOST_KNOWN = 1 << 16
"""Texts whose tokens are kept."""


def cut_off(text: bytes) -> int:
    """Number of bytes at the end of a text that are the beginning of a character."""
    for size in range(1, min(len(text), 3) + 1):
        byte = text[-size]
        if byte >= 0xC0:
            return size if size < 2 + (byte >= 0xE0) + (byte >= 0xF0) else 0
        if byte < 0x80:
            return 0
    return 0


class Speller:
    """Tokens that the target's tokenizer writes for a text after the tokens so far.

    Args:
        tokenizer: The target's.

    Attributes:
        bytes: Of each of the target's tokens, as from `token_bytes`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.bytes = token_bytes(tokenizer)
        self._tokenizer = tokenizer
        self._known: dict[bytes, list[int]] = {}

    def text(self, tokens: TokenArray) -> bytes:
        """UTF-8 text of tokens, special ones left out."""
        return b"".join(self._of(token) or b"" for token in tokens.tolist())

    def spell(self, tail: TokenArray, texts: Sequence[bytes]) -> list[list[int]]:
        """Tokens of each text.

        Text and tail are tokenized together. Where the tokenizer would have joined the end of the tail with
        the text, the text is tokenized alone.

        Args:
            tail: int32. The last tokens so far, `LOOK_BEHIND` are enough.
            texts: UTF-8, each possibly with a part of a character at its end, which is left out.

        Returns:
            A list for each text; empty where its tokens are not the text's.
        """
        before = self._before(tail)
        ends = [text[: len(text) - cut_off(before + text)] for text in texts]
        joined = self._tokens([before + text if text else b"" for text in ends])
        found = [
            _last(tokens, self._lengths(tokens), len(text)) for tokens, text in zip(joined, ends, strict=True)
        ]
        alone = [index for index, text in enumerate(ends) if text and not found[index]]
        for index, tokens in zip(alone, self._tokens([ends[index] for index in alone]), strict=True):
            found[index] = _last(tokens, self._lengths(tokens), len(ends[index]))
        return found

    def _before(self, tail: TokenArray) -> bytes:
        """Text of the tail, from its last special token and the beginning of a character on."""
        texts = [self._of(token) for token in tail.tolist()]
        while None in texts:
            texts = texts[texts.index(None) + 1 :]
        while texts and 0x80 <= (texts[0] or b"\x80")[0] < 0xC0:
            texts = texts[1:]
        return b"".join(text or b"" for text in texts)

    def _tokens(self, texts: Sequence[bytes]) -> list[list[int]]:
        known = self._known
        found = {text: known.get(text) for text in texts}
        unknown = [text for text, tokens in found.items() if tokens is None]
        if unknown:
            words = [text.decode("utf-8", "replace") for text in unknown]
            spelled = self._tokenizer(words, add_special_tokens=False)["input_ids"]
            fresh = dict(zip(unknown, map(list, spelled), strict=True))
            found.update(fresh)
            if len(known) + len(fresh) > _MOST_KNOWN:
                self._known = fresh  # another dict: other threads read the old one
            else:
                known.update(fresh)
        return [found[text] or [] for text in texts]

    def _lengths(self, tokens: Sequence[int]) -> list[int]:
        return [len(self._of(token) or b"") for token in tokens]

    def _of(self, token: int) -> bytes | None:
        return self.bytes[token] if 0 <= token < len(self.bytes) else None


def _last(tokens: list[int], lengths: list[int], size: int) -> list[int]:
    """The last tokens that have `size` bytes together; none where no token begins there."""
    first = len(tokens)
    while size > 0 and first and lengths[first - 1]:
        first -= 1
        size -= lengths[first]
    return tokens[first:] if size == 0 else []


def joined_tree(tree: ModelTree, spelled: Sequence[list[int]], most: int) -> ModelTree:
    """A draft model's tree in the target's tokens.

    A node of the result has the probability of all draft paths that are spelled with it: the psi of
    string-level rejection sampling (SLRS; Timor et al., arXiv:2502.05202), summed over the paths of the tree.

    Args:
        tree: In draft tokens, parents before children.
        spelled: The target's tokens for the path of each node.
        most: The most nodes to return, the most probable first.

    Example:
        q(a) = .9, q(b | a) = .8, and the target writes a, b as one token: ab .72, a .18
    """
    paths = np.array(tree.probs, np.float64)
    for node, parent in enumerate(tree.parents.tolist()):
        if parent >= 0:
            paths[node] *= paths[parent]
    ends = paths.copy()
    for node, parent in enumerate(tree.parents.tolist()):
        if parent >= 0:
            ends[parent] -= paths[node]
    nodes: dict[tuple[int, int], int] = {}
    parents: list[int] = []
    masses: list[float] = []
    for tokens, mass in zip(spelled, ends.tolist(), strict=True):
        at = -1
        for token in tokens:
            node = nodes.setdefault((at, token), len(masses))
            if node == len(masses):
                parents.append(at)
                masses.append(0.0)
            masses[node] += max(mass, 0.0)
            at = node
    order = sorted(range(len(masses)), key=lambda node: (-masses[node], node))[:most]
    order = [node for node in order if masses[node] > 0.0]
    index_of = {-1: -1} | {node: index for index, node in enumerate(order)}
    tokens = [token for _, token in nodes]
    return ModelTree(
        np.array([tokens[node] for node in order], np.int32),
        np.array([index_of[parents[node]] for node in order], np.int32),
        _probs([masses[node] for node in order], [index_of[parents[node]] for node in order]),
    )


def _probs(masses: list[float], parents: list[int]) -> NDArray[np.float32]:
    above = [masses[parent] if parent >= 0 else 1.0 for parent in parents]
    return np.array([mass / over for mass, over in zip(masses, above, strict=True)], np.float32)
