"""Calls that are recorded once and replayed: CUDA graphs, and a tape that stands for them anywhere."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CapturedCalls", "CudaGraph", "TapeGraph", "UncapturableError", "run_capturable"]

Result = TypeVar("Result")


class UncapturableError(RuntimeError):
    """The host has to know a value, or to choose a shape, in the middle of the calls."""


class CapturedCalls(Protocol):
    """Calls on tensors, with all that host code decided: addresses, shapes, numbers."""

    def capture(self, calls: Callable[[], Result]) -> Result:
        """Runs `calls` for the record; the tensors in what it returns are those that `replay` writes."""
        ...

    def replay(self) -> None:
        """Runs the calls again, on what the same tensors hold now."""
        ...


class CudaGraph:
    """A CUDA graph.

    Args:
        device: Of all tensors.
        pool: Memory that graphs share, of which only one is replayed at a time; see `torch.cuda.graph`.
    """

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._device, self._pool = device, pool
        self._graph: Any = None

    def capture(self, calls: Callable[[], Result]) -> Result:
        """As of `CapturedCalls`. The calls run once before, so that libraries have made their plans."""
        with torch.cuda.device(self._device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                calls()
            current.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            collects = gc.isenabled()
            gc.disable()  # a graph that is collected meanwhile would spoil the capture
            try:
                with torch.cuda.graph(
                    self._graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
                ):
                    result = calls()
            finally:
                if collects:
                    gc.enable()
            # A capture runs nothing.
            self._graph.replay()
            return result

    def replay(self) -> None:
        """As of `CapturedCalls`, on the current stream."""
        with torch.cuda.device(self._device):
            self._graph.replay()


_READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"}
"""Operations whose result is on the host."""

_SHAPES = {
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "bincount",
    "nonzero_numpy",
}
"""Operations whose result has a shape that the host learns from values."""


def run_capturable(calls: Callable[[], Result], record: list[Any] | None = None) -> Result:
    """Runs calls on tensors that a graph could capture.

    Args:
        calls: Makes them.
        record: Gets each call with its tensors; None for no record.

    Raises:
        UncapturableError: A call whose result the host reads.
    """
    with _NoHostReads(), _Recorder(record):
        return calls()


class TapeGraph:
    """The aten calls of a function, each with its tensors.

    A replay makes the same calls on the same tensors, as a CUDA graph does, and so it is right or wrong where
    that is; only what a device would refuse for reasons of its own is not seen. Calls after which the host
    knows a value are refused.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def capture(self, calls: Callable[[], Result]) -> Result:
        """As of `CapturedCalls`.

        Raises:
            UncapturableError: A call whose result the host reads.
        """
        return run_capturable(calls, self._calls)

    def replay(self) -> None:
        """As of `CapturedCalls`."""
        for call, arguments, options, outputs in self._calls:
            results = list(_tensors(call(*arguments, **options)))
            for output, result in zip(outputs, results, strict=True):
                # Views and what was written in place are there already.
                if output.untyped_storage().data_ptr() != result.untyped_storage().data_ptr():
                    output.copy_(result)


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Any] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _READS or name in _SHAPES or _chooses_by_mask(name, args) or _repeats_unknown(func):
            raise UncapturableError(f"aten.{name} lets the host wait for a value.")
        result = func(*args, **(kwargs or {}))
        if self._calls is not None:
            self._calls.append((func, args, kwargs or {}, list(_tensors(result))))
        return result


class _NoHostReads(TorchFunctionMode):
    """Refuses what reads the memory of a tensor past the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            raise UncapturableError(f"Tensor.{func.__name__} lets the host wait for values.")
        return func(*args, **(kwargs or {}))


def _chooses_by_mask(name: str, args: tuple[Any, ...]) -> bool:
    """True for an index by a mask, whose trues are counted first; one value alone is filled in without."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    if name != "index" and args[2].numel() == 1:
        return False
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])


def _repeats_unknown(func: Any) -> bool:
    return func is torch.ops.aten.repeat_interleave.Tensor


def _tensors(result: Any) -> Iterable[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for each in result:
            yield from _tensors(each)
