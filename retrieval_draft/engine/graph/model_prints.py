"""The state of a model that a captured pass was made with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["model_print"]

_PLAIN = (bool, int, float, str, type(None))


def model_print(model: nn.Module) -> int:
    """A hash of all that passes depend on besides the values in tensors, which a captured pass reads anew.

    Addresses, shapes and dtypes of parameters, buffers and other tensors of modules; their plain attributes,
    such as the scales of adapters and the training mode; hooks, replaced ``forward`` functions, the attention
    and the experts' implementation; torch's own modes.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    modes = (
        text._attn_implementation,
        getattr(text, "_experts_implementation", None),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    )
    return hash((modes, tuple(part for module in model.modules() for part in _parts(module))))


def _parts(module: nn.Module) -> Iterator[Any]:
    yield id(type(module))
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers"):
            for key, tensor in value.items():
                yield key, _of_tensor(tensor)
        elif name == "_modules":
            yield tuple((key, id(child)) for key, child in value.items())
        elif name.endswith("_hooks"):
            # Those that watch for this package come and go, and captured passes do without them.
            yield name, tuple(id(hook) for hook in value.values() if not _is_own(hook))
        elif name.endswith(("_hooks_with_kwargs", "_hooks_always_called")):
            continue  # numbers of hooks, which count up
        else:
            yield name, _of_value(value)


def _is_own(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("retrieval_draft.engine.")


def _of_value(value: Any, depth: int = 0) -> Any:
    """A hashable form of a plain value, or of a collection of such; the identity of anything callable."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if depth < 3:
        if isinstance(value, dict):
            return tuple((str(key), _of_value(each, depth + 1)) for key, each in value.items())
        if isinstance(value, (list, tuple, set, frozenset)):
            return tuple(_of_value(each, depth + 1) for each in value)
    return id(value) if callable(value) else type(value).__name__


def _of_tensor(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    if type(tensor) not in (Tensor, nn.Parameter):
        return id(tensor), tuple(tensor.shape)  # a subclass, as of quantised weights, may have no address
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), str(tensor.dtype), str(tensor.device)
