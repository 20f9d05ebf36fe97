"""Output heads of draft models over the tokens that a text is likely to use, not a whole vocabulary."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import skip_init

from retrieval_draft.engine.cpu.linear import CpuLinear
from retrieval_draft.engine.model_version import ModelVersion
from retrieval_draft.engine.substitution import wrap_forwards
from retrieval_draft.errors import InvalidInputError

__all__ = ["VocabTrim", "VocabTrims", "columns_for", "trim_of"]

LEAST = 4096
"""Columns at least; a vocabulary of less than twice as many is not trimmed."""

PART = 8
"""The vocabulary over the columns."""

MOST = 16384
"""Columns at most: half of an eighth of Gemma 3's vocabulary. The other half gained its drafts nothing,
and took a tenth of the time of its passes."""

MOST_TRIMS = 4
"""Keys whose trims are kept at a time; each has rows of its own."""

FADING = 0.5
"""Factor of a token's count each time that tokens are chosen anew."""


def columns_for(vocabulary: int) -> int:
    """Columns of a trimmed head; 0 where trimming saves too little."""
    columns = min(max(vocabulary // PART, LEAST), MOST)
    return columns if 2 * columns <= vocabulary else 0


class VocabTrim:
    """The tokens that a draft model or head chooses among, with their rows of its output heads.

    As in VocabTrim (arXiv:2506.22694), but not fixed. A text brings its prompt's tokens, and those that the
    target emits or ranks high as it grows; half of the rest are the lowest ids, which byte-pair encodings
    give to frequent tokens. Once all columns are taken, those most counted stay: tokens of earlier texts.
    Drafts of other tokens are missed, which costs speed and never changes the output. Tokens are counted as
    they come, and get their columns before the next draft: a source that sleeps copies no rows.

    Args:
        heads: Linear layers with a row for each token.
        vocabulary: Tokens that may be drafted: ids below this.
        columns: Tokens to choose among.

    Example:
        8 tokens, 4 columns: 0 and 1 at first; a text with 6 and 7 has 0, 1, 6, 7
    """

    def __init__(self, heads: Sequence[nn.Linear], vocabulary: int, columns: int) -> None:
        self._heads = list(heads)
        self._columns = columns
        self._counts: NDArray[np.float32] = np.zeros(vocabulary, np.float32)
        self._counts[: columns // 2] = np.linspace(0.5, 0.0, columns // 2, endpoint=False)
        self._is_in: NDArray[np.bool_] = np.zeros(vocabulary, np.bool_)
        self._is_wanted: NDArray[np.bool_] = np.zeros(vocabulary, np.bool_)
        self._has_added = False
        self._ids: NDArray[np.int64] = np.empty(0, np.int64)
        self._copies = nn.ModuleList()
        self._linear = CpuLinear(self._copies)
        self._version = ModelVersion(nn.ModuleList(heads))
        self._copied = self._version.current()
        self.add(np.arange(columns // 2))

    def add(self, tokens: NDArray[Any]) -> None:
        """Counts tokens, any shape, and has them drafted from now on."""
        flat = np.asarray(tokens).reshape(-1)
        flat = flat[(flat >= 0) & (flat < len(self._counts))]
        np.add.at(self._counts, flat, 1.0)
        self._is_wanted[flat] = True
        self._has_added = True

    @property
    def ids(self) -> NDArray[np.int64]:
        """int64, shape (n,). Token of each column; another array when it changes."""
        if self._has_added:
            self._has_added = False
            new = np.flatnonzero(self._is_wanted & ~self._is_in)
            self._is_wanted[:] = False
            if len(self._ids) + len(new) > self._columns:
                self._choose()
            elif len(new):
                self._take(np.concatenate((self._ids, new)), len(self._ids))
        return self._ids

    def renew(self) -> None:
        """Copies the rows again where the heads' weights have been written or moved since."""
        now = self._version.current()
        if now != self._copied:
            self._copied = now
            self._copies = nn.ModuleList()
            self._linear = CpuLinear(self._copies)
            self._take(self._ids, 0)

    def prepare(self) -> None:
        """Measures the fastest kernels for the rows on the CPU, once."""
        if len(self.ids):
            self._linear.prepare()

    def logits(self, states: Tensor, head: int = 0) -> Tensor:
        """(n, columns), of states (n, d), by one of the heads."""
        size = len(self.ids)  # before the rows, which it may renew
        copied: Any = self._copies[head]
        forward = self._linear.forward(copied)
        if forward is not None:
            return forward(states)[..., :size]
        weight, bias = copied.weight, copied.bias
        return nn.functional.linear(states, weight[:size], None if bias is None else bias[:size])

    def columns_of(self, tokens: NDArray[Any]) -> NDArray[np.int64]:
        """int64, shape (n,): the column of each token, shape (n,); -1 where it has none."""
        columns: NDArray[np.int64] = np.full(len(self._counts), -1, np.int64)
        columns[self.ids] = np.arange(len(self.ids))
        found: NDArray[np.int64] = columns[tokens]
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and counts."""
        return self._counts.nbytes + sum(weight.nbytes for weight in self._copies.parameters())

    def _choose(self) -> None:
        """Takes the most counted tokens, and leaves a quarter of the columns to the next texts."""
        best = np.argsort(-self._counts, kind="stable")[: self._columns * 3 // 4]
        self._counts *= FADING
        self._is_in[:] = False
        self._take(np.sort(best), 0)

    def _take(self, ids: NDArray[np.int64], kept: int) -> None:
        """Sets the columns, of which the first `kept` are as before."""
        self._ids = ids.astype(np.int64)
        self._is_in[ids] = True
        for at, head in enumerate(self._heads):
            rows = torch.from_numpy(self._ids[kept:]).to(head.weight.device)
            if at == len(self._copies):
                self._copies.append(_empty_rows(head, self._columns))
            copied: Any = self._copies[at]
            with torch.no_grad():
                copied.weight[kept : len(ids)] = head.weight[rows]
                if head.bias is not None:
                    copied.bias[kept : len(ids)] = head.bias[rows]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Has the first head give these columns alone, in this thread inside the context."""
        (head, *_) = self._heads
        with wrap_forwards([(head, lambda present: _trimmed(head, present))]):
            before, _active.trims = getattr(_active, "trims", ()), ((head, self),)
            try:
                yield
            finally:
                _active.trims = before


class VocabTrims:
    """Trims of the same output heads, one for each key that sets requests apart.

    The tokens of a tenant's texts, and how often they came, choose its own drafts and no other's. The least
    recently used trim is forgotten beyond `MOST_TRIMS`, and begins anew if its key comes back.

    Args:
        heads, vocabulary, columns: As for `VocabTrim`.
    """

    def __init__(self, heads: Sequence[nn.Linear], vocabulary: int, columns: int) -> None:
        self._make = partial(VocabTrim, heads, vocabulary, columns)
        self._trims: dict[Hashable, VocabTrim] = {}
        self.share = columns / vocabulary

    def of(self, key: Hashable) -> VocabTrim:
        """The trim of a key, with rows of the present weights; a request with that key begins."""
        trim = self._trims.pop(key, None) or self._make()
        trim.renew()
        self._trims[key] = trim
        if len(self._trims) > MOST_TRIMS:
            del self._trims[next(iter(self._trims))]
        return trim

    def prepare(self) -> None:
        """Measures the fastest kernels for a trim's rows on the CPU, once."""
        self.of(None).prepare()

    @property
    def nbytes(self) -> int:
        """Bytes of all trims."""
        return sum(trim.nbytes for trim in self._trims.values())


def _empty_rows(head: nn.Linear, rows: int) -> nn.Linear:
    """A layer as another one, with so many rows, all zero."""
    weight = head.weight
    made: nn.Linear = skip_init(
        nn.Linear, weight.shape[1], rows, head.bias is not None, device=weight.device, dtype=weight.dtype
    )
    for each in made.requires_grad_(False).parameters():
        each.zero_()
    return made


_active = threading.local()


def _trimmed(head: nn.Linear, present: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        for module, trim in getattr(_active, "trims", ()):
            if module is head:
                out: Tensor = trim.logits(args[0] if args else kwargs["input"])
                return out
        return present(*args, **kwargs)

    return forward


@torch.no_grad()
def trim_of(model: Any, vocabulary: int, columns: int | None = None) -> VocabTrims | None:
    """Trims of a model's output head.

    Args:
        model: Any causal model of transformers.
        vocabulary: Tokens that may be drafted.
        columns: Tokens to choose among; 0 for all, None for `columns_for`.

    Returns:
        None where none is wanted, the head is no plain linear layer, or the model does more with its logits
        than what it does with each alone.
    """
    head = model.get_output_embeddings()
    if columns is not None and columns < 0:
        raise InvalidInputError(f"columns is {columns}; it must be 0 or more.", "0 is for all tokens.")
    columns = columns_for(vocabulary) if columns is None else columns
    if (
        not columns
        or columns >= vocabulary
        or type(head) is not nn.Linear
        or head.weight.device.type == "meta"
        or len(head.weight) < vocabulary
        or not head.weight.is_floating_point()
    ):
        return None
    trims = VocabTrims([head], vocabulary, columns)
    trim = trims.of(None)
    ids = torch.zeros((1, 1), dtype=torch.int64, device=head.weight.device)
    try:
        whole = model(ids).logits[0]
        with trim.applied():
            part = model(ids).logits[0]
    except Exception:  # of any type, in the model's own code: it needs all of its logits
        return None
    wanted = whole[:, torch.from_numpy(trim.ids).to(whole.device)]
    return (
        trims if part.shape == wanted.shape and torch.allclose(part, wanted, rtol=1e-2, atol=1e-2) else None
    )
