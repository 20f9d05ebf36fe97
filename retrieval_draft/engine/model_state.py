"""The model between requests: changes since a drafter was made for it, and modes that it cannot decode in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from retrieval_draft.engine.wrapped_models import device_of, refuse_activated_adapter
from retrieval_draft.errors import UnsupportedModelError

__all__ = ["ModelState", "check_modules", "outside_inference"]

_ANEW = "Make the drafter anew with RetrievalDrafter.for_model(model)."
_EVALUATE = "Call model.eval() before generating, and model.train() afterwards."
_RANDOM = ("dropout", "drop_prob", "drop_path", "layerdrop", "layer_drop", "jitter")
"""Parts of the names of a layer's attributes that hold probabilities of dropping or disturbing values in
training."""
_NO_MASKS = ("flash", "flex", "paged")


@dataclass(frozen=True, slots=True)
class ModelState:
    """Shapes, dtype and device of a model, which its drafter relies on.

    Attributes:
        embedding_rows: Number of token ids that it reads.
        head_rows: Number of token ids that it outputs; None without an output head.
        dtype: Of its weights, and of the masks that it is given.
        device: Device of its inputs.
    """

    embedding_rows: int
    head_rows: int | None
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: Any) -> ModelState:
        """The state of a model of transformers as it is now."""
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        weight: Any = getattr(head, "weight", None)
        rows = int(weight.shape[0]) if isinstance(weight, torch.Tensor) else None
        return cls(int(embedding.weight.shape[0]), rows, model.dtype, device_of(embedding))

    def check(self, model: Any, needs_masks: bool = True) -> None:
        """Refuses a model that has changed. Takes microseconds.

        Args:
            model: The model.
            needs_masks: Whether its attention must follow masks of trees.

        Raises:
            UnsupportedModelError: Names the change, with both values.
        """
        now = ModelState.of(model)
        if now != self:
            name = type(model).__name__
            if (now.embedding_rows, now.head_rows) != (self.embedding_rows, self.head_rows):
                raise UnsupportedModelError(
                    f"The token embeddings of {name} were resized from {self.embedding_rows} to "
                    f"{now.embedding_rows} rows, its output head from {self.head_rows} to {now.head_rows}, "
                    "since the drafter was made.",
                    _ANEW,
                )
            raise UnsupportedModelError(
                f"{name} had {self.dtype} on {self.device} when the drafter was made with for_model; now it "
                f"has {now.dtype} on {now.device}.",
                _ANEW,
            )
        attention = str(model.config.get_text_config(decoder=True)._attn_implementation)
        if needs_masks and any(part in attention for part in _NO_MASKS):
            raise UnsupportedModelError(
                f"The model's attention was set to {attention!r}, which ignores tree masks.",
                'Set it back with model.set_attn_implementation("sdpa").',
            )


def check_modules(model: nn.Module) -> None:
    """Refuses layers whose outputs would differ from those in model.generate, or be random.

    Args:
        model: Any.

    Raises:
        UnsupportedModelError: Names the layer.
    """
    for name, module in model.named_modules():
        refuse_activated_adapter(name, module)
        if module.training:
            if getattr(module, "gradient_checkpointing", False):
                raise UnsupportedModelError(
                    "The model is in training mode with gradient checkpointing, which takes no cache.",
                    _EVALUATE,
                )
            _refuse_randomness(name, module)


def _refuse_randomness(name: str, module: nn.Module) -> None:
    attributes = module.__dict__
    if isinstance(module, nn.modules.dropout._DropoutNd):
        attributes = {"dropout": module.p}
    elif not any(part in attribute for attribute in attributes for part in _RANDOM):
        return
    for attribute, value in attributes.items():
        if isinstance(value, float) and value > 0 and any(part in attribute for part in _RANDOM):
            raise UnsupportedModelError(
                f"The model is in training mode, and {name or type(module).__name__} has {attribute} "
                f"{value:g}: what it says is random, so that no draft can be verified.",
                _EVALUATE,
            )


@contextmanager
def outside_inference() -> Iterator[None]:
    """Turns gradients and torch.inference_mode off: tensors made inside can be written to later."""
    with torch.inference_mode(False), torch.no_grad():
        yield
