"""Counts what torch's dispatcher is asked for."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "new_empty",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}
"""Calls that launch nothing on a device."""


class Dispatched(TorchDispatchMode):
    """The aten calls of this thread, in order.

    Args:
        depth: Anything, not empty while nothing is counted.
    """

    def __init__(self, depth: Sized = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._depth = depth
        self.calls: list[tuple[str, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not len(self._depth):
            self.calls.append((func.overloadpacket.__name__, args, out))
        return out

    @property
    def launches(self) -> list[str]:
        """Calls that would launch a kernel, or copy."""
        return [name for name, _, _ in self.calls if name not in VIEWS]
