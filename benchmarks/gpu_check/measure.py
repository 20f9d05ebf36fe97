"""Clocks and counters: host and device time, launched kernels, copies, waits."""

from __future__ import annotations

import collections
import contextlib
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_check.setting import synchronize

__all__ = ["Counter", "Counts", "counted", "counter", "device_us", "milliseconds", "read_trace"]

_VIEWS = (
    "view", "slice", "select", "narrow", "unsqueeze", "squeeze", "expand", "transpose", "permute", "t.",
    "as_strided", "_unsafe_view", "alias", "detach", "unflatten", "flatten", "split", "unbind", "reshape",
    "_reshape_alias", "sym_", "lift_fresh", "empty", "_local_scalar", "unsafe_split", "view_as", "chunk",
    "is_", "size", "stride", "resolve",
)  # fmt: skip
"""Operations that launch no kernel."""


@dataclass
class Counts:
    """Counts of a piece of work.

    Attributes:
        kernels: Launched; on a CPU, dispatched operators that compute something.
        up: Copies from the host.
        down: Copies to the host.
        syncs: Waits of the host for the device.
        mallocs: cudaMalloc calls.
        busy_ms: Time in which the device ran anything.
        warned: Waits that torch's own sync debug mode saw.
    """

    kernels: int = 0
    up: int = 0
    down: int = 0
    syncs: int = 0
    mallocs: int = 0
    busy_ms: float = 0.0
    warned: int = 0
    names: collections.Counter[str] = field(default_factory=collections.Counter)

    def by_step(self, steps: int) -> dict[str, float]:
        """The counts over a number of steps."""
        fields = ("kernels", "up", "down", "syncs", "mallocs", "busy_ms", "warned")
        return {name: round(getattr(self, name) / steps, 3) for name in fields}


def milliseconds(work: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Wall time of `work` with the wait for the device, once for each round."""
    times = []
    for _ in range(rounds):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def device_us(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Microseconds of `work` on the device, launches queued ahead; the median of three series."""
    if device.type != "cuda":
        return 1e3 * float(statistics.median(milliseconds(work, device, max(2, rounds // 4))))
    series = []
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(rounds):
            work()
        end.record()
        end.synchronize()
        series.append(1e3 * begin.elapsed_time(end) / rounds)
    return float(statistics.median(series))


class Counter(Protocol):
    """Counter of the work between two moments.

    Attributes:
        counts: Complete after `stop`.
    """

    counts: Counts

    def start(self) -> None:
        """Starts counting."""
        ...

    def stop(self) -> None:
        """Stops counting."""
        ...


def counter(device: torch.device) -> Counter:
    """Counts with torch's profiler on CUDA, by dispatch on a CPU."""
    return _Profiled(device) if device.type == "cuda" else _Dispatched()


def counted(work: Callable[[], object], device: torch.device) -> Counts:
    """Runs `work` once and counts its operations."""
    found = counter(device)
    found.start()
    try:
        work()
    finally:
        found.stop()
    return found.counts


class _Profiled:
    def __init__(self, device: torch.device) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.counts = Counts()
        self._device = device
        self._profiler = profile(activities=[ProfilerActivity.CUDA], acc_events=True)
        self._warnings = contextlib.ExitStack()
        self._caught: list[warnings.WarningMessage] = []

    def start(self) -> None:
        synchronize(self._device)
        self._profiler.start()
        self._caught = self._warnings.enter_context(_sync_warnings())

    def stop(self) -> None:
        self._warnings.close()
        synchronize(self._device)
        self._profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self._profiler.export_chrome_trace(str(path))
            self.counts = read_trace(json.loads(path.read_text()).get("traceEvents", []))
        self.counts.warned = len(self._caught)
        self.counts.syncs = max(self.counts.syncs - 1, 0)  # the wait after the work


def read_trace(events: list[dict[str, Any]]) -> Counts:
    """Counts the events of a chrome trace that torch's profiler wrote."""
    counts, spans = Counts(), []
    for event in events:
        kind, name = str(event.get("cat", "")), str(event.get("name", ""))
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            spans.append((float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0))))
            if kind == "kernel":
                counts.kernels += 1
                counts.names[name[:80]] += 1
            elif "HtoD" in name:
                counts.up += 1
            elif "DtoH" in name:
                counts.down += 1
        elif kind in ("cuda_runtime", "cuda_driver"):
            if "Synchronize" in name:
                counts.syncs += 1
            elif name.startswith(("cudaMalloc", "cuMemAlloc", "cuMemCreate")) and "Host" not in name:
                counts.mallocs += 1
    end = float("-inf")
    for first, last in sorted(spans):
        counts.busy_ms += max(0.0, last - max(first, end)) / 1e3
        end = max(end, last)
    return counts


@contextlib.contextmanager
def _sync_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Collects torch's warnings of waits that it makes by itself."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        found: list[warnings.WarningMessage] = []
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [each for each in caught if "synchronizing CUDA operation" in str(each.message)]


class _Dispatched(TorchDispatchMode):
    """Counts operators where there is no device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()

    def start(self) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not name.startswith(_VIEWS):
            self.counts.kernels += 1
            self.counts.names[name] += 1
        return func(*args, **(kwargs or {}))
