"""Faster kernels for forward passes over few tokens on the CPU, in use while the drafter decodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch

from retrieval_draft.engine.cpu.attention import is_worthwhile, wide_attention
from retrieval_draft.engine.cpu.decoder_layer import CpuDecoderLayers
from retrieval_draft.engine.cpu.linear import CpuLinear
from retrieval_draft.engine.cpu.norm import CpuNorm
from retrieval_draft.engine.substitution import lend_forwards

__all__ = ["CpuKernels"]


class CpuKernels:
    """A model's layers, which can use faster kernels for a while.

    Modules keep their class and weights; calls under autograd, autocast or a compiler run as ever. While the
    kernels are applied, every user of the model gets them, in any thread: results differ in the last
    bits only.

    Args:
        model: Any model of transformers.
        enabled: False makes everything here do nothing, as does a model on another device.
    """

    def __init__(self, model: Any, enabled: bool = True) -> None:
        self._model = model
        self._enabled = enabled
        self.linear = CpuLinear(model)
        self._norm = CpuNorm(model)
        self._layers = CpuDecoderLayers(model, self.linear, self._norm)

    @property
    def is_active(self) -> bool:
        """True if `applied` changes anything now."""
        return (
            self._enabled
            and any(parameter.device.type == "cpu" for parameter in self._model.parameters())
            and not torch.compiler.is_compiling()
            and getattr(self._model, "_compiled_call_impl", None) is None
        )

    def prepare(self) -> None:
        """Measures which kernels are fastest here, once for a machine and a shape; observes layers."""
        if self.is_active:
            self.linear.prepare()
            self._layers.prepare()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Lends the model the kernels for the duration of the context."""
        with ExitStack() as stack:
            if self.is_active:
                parts = (self.linear, self._norm, self._layers)
                forwards = chain.from_iterable(part.forwards() for part in parts)
                stack.enter_context(lend_forwards(forwards))
                if is_worthwhile(self._model):
                    stack.enter_context(wide_attention(self._model))
            yield
