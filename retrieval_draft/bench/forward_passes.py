"""Counts of a model's forward passes by a hook, for any decoding loop."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

__all__ = ["ForwardPasses"]


class ForwardPasses:
    """Counts the forward passes of `model` while the context is open.

    Args:
        model: A causal language model.
        before: Called before each pass.

    Attributes:
        passes: Passes so far, the prefill's included.
        fed: Tokens given to each pass but the first, in all.
    """

    def __init__(self, model: Any, before: Callable[[], None] | None = None) -> None:
        self.passes = 0
        self.fed = 0
        self._model = model
        self._before = before
        self._hook: Any = None

    def __enter__(self) -> ForwardPasses:
        self._hook = self._model.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._before is not None:
            self._before()
        ids = kwargs.get("input_ids", args[0] if args else None)
        if self.passes and ids is not None:
            self.fed += int(ids.shape[1])
        self.passes += 1
