"""Multi-token prediction: the layers that DeepSeek V3, GLM and others were trained with to see further.

Layer k guesses the token k + 2 positions after a state, from what layer k - 1 made of it (the target's state
for the first) and the token k + 1 positions after it (DeepSeek-V3, arXiv:2412.19437). The layers, their
weights and their names are those of transformers' `MtpModel`. A single such layer is used again on its own
output for the levels after the first, as EAGLE's is and as servers do with these models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from retrieval_draft.engine.compat import mtp_classes
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits, Growth
from retrieval_draft.engine.hidden_states import LAST
from retrieval_draft.errors import ModelFileError, UnsupportedEngineError, UnsupportedModelError

__all__ = ["MtpHead", "load_mtp"]

KINDS = ("full_attention", "sliding_attention")
"""Kinds of layers that keep keys and values of every token, which can be cut at any of them."""

LIMITS = ExpansionLimits(top_k=4, depth=4)


def load_mtp(model: Any) -> MtpHead:
    """The layers for multi-token prediction from a model's own checkpoint.

    Args:
        model: The target, loaded from a folder or a hub name.

    Raises:
        UnsupportedEngineError: This transformers cannot read them.
        UnsupportedModelError: The model's configuration names none and its checkpoint has none, or they are
            of a kind without keys.
        ModelFileError: The checkpoint lacks some of their weights, or has others.
    """
    classes = mtp_classes()
    if classes is None:
        raise UnsupportedEngineError(
            "This transformers has no MtpModel, which reads layers for multi-token prediction.",
            "Run: pip install --upgrade transformers",
        )
    config = model.config.get_text_config(decoder=True)
    with _usable_checkpoint(model):
        count = getattr(config, "num_mtp_layers", None) or _layers_in_checkpoint(model)
    if not count:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layers for multi-token prediction: num_mtp_layers is "
            f"{getattr(config, 'num_mtp_layers', None)}, and its checkpoint has none.",
            "Name a head's checkpoint as draft_model instead.",
        )
    kinds = getattr(config, "mtp_layer_types", None) or KINDS[:1] * count
    if not set(kinds) <= set(KINDS):
        raise UnsupportedModelError(
            f"The layers for multi-token prediction of {type(model).__name__} are {', '.join(kinds)}; drafts "
            f"come from {' and '.join(KINDS)}.",
            "Name a head's checkpoint as draft_model instead.",
        )
    device = model.get_input_embeddings().weight.device
    with _usable_checkpoint(model), _completed(config, num_mtp_layers=count, mtp_layer_types=list(kinds)):
        loaded = classes[0].from_pretrained(model, device_map={"": device})
    return MtpHead(loaded.eval())


def _layers_in_checkpoint(model: Any) -> int:
    """Layers for multi-token prediction among the weights that a model's class leaves out.

    Qwen3-Next and Qwen 3.5 have them beside the model, as ``mtp.layers.0``, and no configuration that
    transformers reads names their number.
    """
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if not any(re.search(pattern, "mtp.layers.0.") for pattern in ignored):
        return 0
    name, missing = model.config.name_or_path, {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **missing)
    if index is not None:
        keys = list(json.loads(Path(index).read_bytes())["weight_map"])
    else:
        file = cached_file(name, SAFE_WEIGHTS_NAME, **missing)
        if file is None:
            return 0
        with safe_open(file, framework="pt") as weights:
            keys = list(weights.keys())
    return len({found[1] for key in keys if (found := re.match(r"mtp\.layers\.(\d+)\.", key))})


@contextmanager
def _usable_checkpoint(model: Any) -> Iterator[None]:
    """Turns errors of a model's checkpoint into one that names it."""
    try:
        yield
    except Exception as error:  # of safetensors, of files, of transformers' own checks
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelFileError(
            f"The checkpoint {model.config.name_or_path!r} has no usable layers for multi-token prediction: "
            f"{first}",
            "Load the model from a folder or hub name whose weights include them.",
        ) from error


@contextmanager
def _completed(config: Any, **values: Any) -> Iterator[None]:
    """Gives a configuration the values that it lacks, inside the context."""
    missing = [name for name in values if getattr(config, name, None) is None]
    before = {name: getattr(config, name) for name in missing if hasattr(config, name)}
    for name in missing:
        setattr(config, name, values[name])
    try:
        yield
    finally:
        for name in missing:
            delattr(config, name)
        for name, value in before.items():
            setattr(config, name, value)


class _State:
    """Keys, values and outputs of the layers for one text.

    Attributes:
        cache: Of row i and layer k, keys of the token i + k + 1; layer k lacks the last k rows.
        outputs: (rows, d) of each layer.
        length: Rows.
        position: Position of the token after the last row's state, the root.
        paths: By node, its parent's first: what the layer took in and gave along its path, (steps, d) each.
    """

    def __init__(self, cache: Any, layers: int) -> None:
        self.cache = cache
        self.outputs: list[Tensor | None] = [None] * layers
        self.length = self.position = 0
        self.paths: dict[int, tuple[Tensor, Tensor]] = {}

    def copy(self, rows: int) -> _State:
        """The state after the first `rows` rows, with memory of its own."""
        other = _State(type(self.cache)(), len(self.outputs))
        other.length, other.position = rows, self.position - self.length + rows
        for at, output in enumerate(self.outputs):
            kept = rows - at
            if output is not None and kept > 0:
                other.outputs[at] = output[:kept].clone()
                layer = self.cache.layers[at]
                other.cache.update(layer.keys[:, :, :kept].clone(), layer.values[:, :, :kept].clone(), at)
        return other

    def mark(self) -> tuple[int, int, list[int]]:
        """Present length, position, and rows of each layer's output, for `cut`."""
        return self.length, self.position, [0 if each is None else len(each) for each in self.outputs]

    def cut(self, mark: tuple[int, int, list[int]]) -> None:
        """Forgets the rows since a `mark`, in keys and values too."""
        self.length, self.position, counts = mark
        for at, count in enumerate(counts):
            output = self.outputs[at]
            self.outputs[at] = None if output is None or not count else output[:count]
            layer = self.cache.layers[at] if at < len(self.cache.layers) else None
            if layer is not None and layer.is_initialized:
                layer.keys, layer.values = layer.keys[:, :, :count], layer.values[:, :, :count]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and outputs."""
        kept = [
            each for layer in self.cache.layers if layer.is_initialized for each in (layer.keys, layer.values)
        ]
        return sum(each.nbytes for each in [*kept, *self.outputs] if each is not None)


class MtpHead:
    """A target's own layers for multi-token prediction, as a `DraftHead`.

    Args:
        model: transformers' `MtpModel`.
        limits: Limits on the growth of its trees.
    """

    layers: tuple[int, ...] = (LAST,)
    reads_all = True
    ids: NDArray[np.int64] | None = None

    def __init__(self, model: Any, limits: ExpansionLimits = LIMITS) -> None:
        self.model = model
        self.limits = limits
        self._count = len(model.layers)
        self.levels: int | None = None if self._count == 1 else self._count
        classes = mtp_classes()
        assert classes is not None
        self._cache_class = classes[1]

    def bind(self, model: Any) -> None:
        """Does nothing: the layers were loaded for the target."""

    def state(self) -> _State:
        """A state of no text."""
        return _State(self._cache_class(), self._count)

    def drop(self, state: _State) -> None:
        """Forgets the nodes that were expanded."""
        state.paths = {}

    def read(
        self,
        states: Sequence[_State],
        tokens: Sequence[Tensor],
        hidden: Sequence[Tensor],
        begins: Sequence[int],
    ) -> list[Tensor]:
        """Reads rows of several texts, one after the other; see `DraftHead.read`."""
        marks = [state.mark() for state in states]
        try:
            given = zip(states, tokens, hidden, begins, strict=True)
            ends = [self._read(state, ids, rows, begin) for state, ids, rows, begin in given]
        except Exception:
            # Each text may be read again by itself: no row may stay twice.
            for state, mark in zip(states, marks, strict=True):
                state.cut(mark)
            raise
        return list(self._logits(torch.cat(ends)).split(1))

    def _read(self, state: _State, ids: Tensor, rows: Tensor, begin: int) -> Tensor:
        """Reads rows of one text; the first layer's last output, (1, d)."""
        taken = rows.to(self.model.dtype)
        for at in range(self._count):
            if at:
                # The row before, whose token is known now, comes in, and the last one waits for its own.
                before, known = state.outputs[at - 1], state.outputs[at]
                assert before is not None
                taken = before[0 if known is None else len(known) : -1]
            if not len(taken):
                break
            part = ids[-len(taken) :]
            first = begin + 1 + len(ids) - len(part)
            given = self._passed(at, taken[None], part[None], first, state.cache)[0]
            known = state.outputs[at]
            state.outputs[at] = given if known is None else torch.cat((known, given))
        state.length += len(ids)
        state.position = begin + len(ids)
        state.paths = {}
        last = state.outputs[0]
        assert last is not None
        return last[-1:]

    def expand(self, states: Sequence[_State], growths: Sequence[Growth]) -> list[Tensor]:
        """Logits after the nodes of each frontier; see `DraftHead.expand`."""
        return [self._expanded(state, growth) for state, growth in zip(states, growths, strict=True)]

    def _expanded(self, state: _State, growth: Growth) -> Tensor:
        nodes = growth.frontier
        depth = growth.depths[nodes[0]]
        at = 0 if self._count == 1 else depth
        taken = torch.stack([self._before(state, growth.parents[node], depth) for node in nodes])
        steps = taken.shape[1]
        paths = [_path(growth, node)[-steps:] for node in nodes]
        ids = torch.tensor(paths, dtype=torch.int64, device=taken.device)
        cache = self._cache_class()
        if at < len(state.cache.layers) and state.cache.layers[at].is_initialized:
            layer = state.cache.layers[at]
            wide = [each.expand(len(nodes), -1, -1, -1) for each in (layer.keys, layer.values)]
            cache.update(*wide, at)
        given = self._passed(at, taken, ids, state.position + depth - steps + 1, cache)
        for node, inputs, outputs in zip(nodes, taken, given, strict=True):
            state.paths[node] = inputs, outputs
        return self._logits(given[:, -1])

    def _before(self, state: _State, parent: int, depth: int) -> Tensor:
        """Input of the layer of a node's depth along the path to it: (steps, d)."""
        first, known = state.outputs[0], state.outputs[0 if self._count == 1 else depth - 1]
        assert first is not None
        last = first[:0] if known is None else known[-1:]
        if not parent:
            return last
        inputs, outputs = state.paths[parent]
        # A single layer takes its own last output besides; one of several those of the layer before.
        return torch.cat((inputs, outputs[-1:]) if self._count == 1 else (last, outputs))

    def _passed(self, at: int, taken: Tensor, ids: Tensor, first: int, cache: Any) -> Tensor:
        """A layer's output, (texts, rows, d), at tokens from position `first` on."""
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
        out: Tensor = self.model.forward_layer(
            at, taken, positions.expand(len(ids), -1), cache, input_ids=ids
        )
        return out

    def _logits(self, vectors: Tensor) -> Tensor:
        out: Tensor = self.model._project_to_logits(vectors)
        return out


def _path(growth: Growth, node: int) -> list[int]:
    """Tokens from a child of the root to a node."""
    tokens: list[int] = []
    while node:
        tokens.insert(0, growth.tokens[node])
        node = growth.parents[node]
    return tokens
