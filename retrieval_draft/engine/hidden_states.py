"""Hidden states of the target, taken while its passes run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from retrieval_draft.engine.wrapped_models import decoder_layers
from retrieval_draft.errors import InvalidInputError, UnsupportedModelError

__all__ = ["LAST", "HiddenStates"]

LAST = -1
"""In place of a layer: the states after the model's last norm, which its output head reads."""


class HiddenStates:
    """The layers of a model that draft sources read, and their states in the pass that ran last.

    Hooks stand only inside of `taken`, and where nothing is read there are none.

    Args:
        model: The target.

    Attributes:
        layers: Layers that are read: i for the input of decoder layer i, `LAST` for what the output head
            reads.

    Example:
        layers (2, LAST), states of width 4: of a pass over 3 tokens `last` is (1, 3, 8), the input of layer 2
        in columns 0 to 3 and that of the output head in 4 to 7
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.layers: tuple[int, ...] = ()
        self._modules: list[Any] = []
        self._taken: list[Tensor | None] = []
        self._thread = 0

    def read(self, layers: Sequence[int]) -> None:
        """Has some layers read from now on, besides those that are.

        Raises:
            InvalidInputError: The model has no such layer.
            UnsupportedModelError: Its layers, or its decoder, are not found.
        """
        for layer in layers:
            if layer not in self.layers:
                self._modules.append(self._module(layer))
                self.layers += (layer,)
        self._taken = [None] * len(self.layers)

    def columns(self, layers: Sequence[int], states: Tensor) -> Tensor:
        """The columns of some layers.

        Args:
            layers: Read ones.
            states: (n, d * number of layers read).

        Returns:
            (n, d * number of `layers`), a view where those are all that are read.
        """
        if tuple(layers) == self.layers:
            return states
        width = states.shape[-1] // len(self.layers)
        parts = [states[:, width * at : width * (at + 1)] for at in map(self.layers.index, layers)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Takes the states of passes that run inside, on this thread; others may use the model meanwhile."""
        self._thread = get_ident()
        with ExitStack() as stack:
            for at, (layer, module) in enumerate(zip(self.layers, self._modules, strict=True)):
                hook = self._after(at) if layer == LAST else self._before(at)
                register = module.register_forward_hook if layer == LAST else module.register_forward_pre_hook
                stack.callback(register(hook, with_kwargs=True).remove)
            try:
                yield
            finally:
                self._taken = [None] * len(self.layers)

    @property
    def last(self) -> Tensor | None:
        """(batch, n, d * number of layers read), of the pass that ran last; None where it gave none."""
        found = [states for states in self._taken if states is not None]
        if not found or len(found) < len(self._taken):
            return None
        return found[0] if len(found) == 1 else torch.cat([each.to(found[0].device) for each in found], -1)

    def _before(self, at: int) -> Any:
        def take(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if get_ident() == self._thread:
                self._taken[at] = args[0] if args else kwargs["hidden_states"]

        return take

    def _after(self, at: int) -> Any:
        def take(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if get_ident() == self._thread:
                self._taken[at] = output if isinstance(output, Tensor) else output[0]

        return take

    def _module(self, layer: int) -> Any:
        if layer == LAST:
            decoder = self._model.get_decoder()
            if self._model.get_output_embeddings() is None or decoder is None or decoder is self._model:
                raise UnsupportedModelError(
                    f"{type(self._model).__name__} has no output head over a decoder, whose states a trained "
                    "head drafts from.",
                    "Pass a draft model instead.",
                )
            return decoder
        layers = decoder_layers(self._model)
        if not 0 <= layer < len(layers):
            raise InvalidInputError(
                f"A head reads layer {layer}; the model has layers 0..{len(layers) - 1}.",
                "Use a head that was trained for this model.",
            )
        return layers[layer]
