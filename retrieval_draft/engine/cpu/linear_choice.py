"""The fastest linear kernel on this machine, by weight shape and number of tokens."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from torch import Tensor

from retrieval_draft._files import cache_home
from retrieval_draft._kernels.jit import source_stamp
from retrieval_draft.engine.cpu.linear_kernels import (
    KERNELS,
    OURS,
    Linear,
    is_amx_available,
    is_tiled_available,
)
from retrieval_draft.engine.cpu.quantized_kernels import QUANTIZED_KERNELS
from retrieval_draft.engine.cpu.quantized_weights import QuantizedWeight

__all__ = ["SIZES", "Choice", "LinearChoices", "Weight", "machine", "shape_key"]

Weight = Tensor | QuantizedWeight
"""(rows, length), as the layer holds it."""

SIZES = (1, 2, 4, 8, 16, 32, 64, 256)
"""Numbers of tokens measured; one in between uses the choice of the next larger, one beyond that of the
last."""

FORMAT_VERSION = 2
ROUNDS = 3
HOPELESS = 1.5
"""A kernel this many times slower than the best in the first round is not timed again."""

SKIPPED = 3.0
"""A kernel r times slower than the best, if r is more than this, is not tried before r times as many tokens.

The best one's time grows at most as the number of tokens does, and no kernel's time shrinks."""

TIE = 1.1
"""A kernel that comes first is used where a later one is faster by less, which may be chance."""

MEASURED_BYTES = 192 << 20
"""Weights read in one timing: more than caches hold, as in a forward pass."""

MANY_TOKENS = 64
"""Above, arithmetic is the limit and not memory: an eighth of the weights shows as much."""

_QUANTIZED_SHARE = 4

_TILES = 64
"""Rows in whole tiles of every kernel."""

_OWN = ("amx", *OURS, "quantized")

MAX_SECONDS = 12.0
"""Seconds after which the remaining shapes are not measured and use our kernel."""

_LOG = logging.getLogger("retrieval_draft")


@dataclass(frozen=True, slots=True)
class Choice:
    """Kernels for a shape and a number of tokens.

    Attributes:
        name: The fastest.
        ours: The fastest of our own, which a decoder layer's programs are made of; `name` if there is none.
        loss: Seconds that ours takes longer for one matrix; infinite where it was hopeless.
    """

    name: str
    ours: str
    loss: float


def shape_key(weight: Weight) -> str:
    """Key of a weight's shape, dtype and representation in the file of choices."""
    kind = f"{weight.kind} " if isinstance(weight, QuantizedWeight) else ""
    return f"{kind}{str(weight.dtype).removeprefix('torch.')} {weight.shape[0]}x{weight.shape[1]}"


def _kernels(weight: Weight) -> dict[str, Callable[[Any, Tensor | None], Linear]]:
    """The kernels that can read a weight, by name."""
    if isinstance(weight, QuantizedWeight):
        return dict(QUANTIZED_KERNELS)
    available = is_tiled_available(weight)
    readable = {name: available for name in OURS} | {"amx": available and is_amx_available(weight)}
    return {name: make for name, make in KERNELS.items() if readable.get(name, True)}


class LinearChoices:
    """Measured once, then read from the user's cache folder, one file for a machine and number of threads.

    A file that cannot be read or written costs a measurement, never a generation.

    Args:
        threads: Number of threads that torch may use.
        folder: Folder of the file; by default ``linear`` in the user's cache folder.
    """

    def __init__(self, threads: int, folder: Path | None = None) -> None:
        self.threads = threads
        self._machine = machine(threads)
        digest = hashlib.sha256(json.dumps(self._machine, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (cache_home() / "linear" if folder is None else folder) / f"{digest}.json"
        self._choices = self._read()

    def has(self, weight: Weight) -> bool:
        """True if a weight's shape has been measured."""
        return shape_key(weight) in self._choices

    def missing(self, weights: Sequence[Weight]) -> dict[str, list[Weight]]:
        """The `weights` whose shape has not been measured, by shape."""
        wanted: dict[str, list[Weight]] = {}
        for weight in weights:
            key = shape_key(weight)
            if key not in self._choices:
                wanted.setdefault(key, []).append(weight)
        return wanted

    def names(self, weight: Weight) -> dict[int, str]:
        """The fastest kernel of a measured shape by number of tokens, for each of `SIZES`."""
        return {size: choice.name for size, choice in self._choices[shape_key(weight)].items()}

    def layers(self, weight: Weight, bias: Tensor | None = None) -> list[tuple[Linear, Linear, float]]:
        """The fastest layer, our own, and the latter's loss in seconds, by number of tokens.

        Args:
            weight: (rows, length), for float32 or bfloat16, of a measured shape.
            bias: (rows,), or None.

        Returns:
            From 0 tokens to the last of `SIZES`, which is used for more too.
        """
        choices = self._choices[shape_key(weight)]
        names = {name for choice in choices.values() for name in (choice.name, choice.ours)}
        made = {name: _kernels(weight)[name](weight, bias) for name in names}
        by_tokens: list[tuple[Linear, Linear, float]] = []
        for size in SIZES:
            choice = choices[size]
            layers = made[choice.name], made[choice.ours], choice.loss
            by_tokens += [layers] * (size + 1 - len(by_tokens))
        return by_tokens

    def measure(self, wanted: dict[str, list[Weight]], advance: Callable[[], object] | None = None) -> None:
        """Times every kernel on each shape of `missing` and keeps the fastest ones.

        Args:
            wanted: Weights by shape; as many of a shape are read in turn as a cache does not hold.
            advance: Called after each shape and size.
        """
        begin = time.perf_counter()
        complete = True
        for key, weights in wanted.items():
            choices: dict[int, Choice] = {}
            skipped: dict[str, float] = {}
            for size in SIZES:
                in_time = time.perf_counter() - begin < MAX_SECONDS
                complete = complete and in_time
                if in_time:
                    some = _enough(weights, MEASURED_BYTES // (8 if size > MANY_TOKENS else 1))
                    choices[size], skipped = _fastest(some, size, skipped)
                else:
                    first = next(iter(_kernels(weights[0])))
                    choices[size] = Choice(first, first, 0.0)
                if advance is not None:
                    advance()
            self._choices[key] = choices
        if complete:
            self._write()

    def _read(self) -> dict[str, dict[int, Choice]]:
        try:
            kept: Any = json.loads(self.path.read_text())
            if kept["format_version"] != FORMAT_VERSION or kept["machine"] != self._machine:
                return {}
            shapes = {key: _checked(choices) for key, choices in kept["shapes"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _LOG.info("measuring linear kernels again: %s cannot be read (%s)", self.path, error)
            return {}
        return {key: choices for key, choices in shapes.items() if choices is not None}

    def _write(self) -> None:
        shapes = {
            key: {size: astuple(choice) for size, choice in choices.items()}
            for key, choices in {**self._read(), **self._choices}.items()
        }
        text = json.dumps(
            {"format_version": FORMAT_VERSION, "machine": self._machine, "shapes": shapes}, indent=1
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.stem}-")
            try:
                with os.fdopen(handle, "w") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                Path(scratch).replace(self.path)
            except OSError:
                Path(scratch).unlink(missing_ok=True)
                raise
        except OSError as error:
            _LOG.info("linear kernels will be measured again: %s cannot be written (%s)", self.path, error)


def _checked(kept: Any) -> dict[int, Choice] | None:
    """A shape's choices out of a file; None unless all name kernels that there are. Raises as a dict does."""
    choices = {size: Choice(*kept[str(size)]) for size in SIZES}
    kernels = KERNELS.keys() | QUANTIZED_KERNELS.keys()
    good = all({choice.name, choice.ours} <= kernels and choice.loss >= 0 for choice in choices.values())
    return choices if good else None


def _enough(weights: Sequence[Weight], most: int) -> list[Weight]:
    """The first weights that come to `most` bytes together; of a larger one that many bytes of whole tiles.

    A quantised weight stays whole, and there are fewer of them: their own library widens all, for each call.
    """
    first = weights[0]
    each = first.nbytes
    if isinstance(first, QuantizedWeight):
        most //= _QUANTIZED_SHARE
    elif each > most:
        rows = first.shape[0] * most // each
        return [first[: max(rows - rows % _TILES, min(first.shape[0], _TILES))]]
    return list(weights[: max(1, most // max(each, 1))])


def _fastest(
    weights: Sequence[Weight], tokens: int, skipped: dict[str, float]
) -> tuple[Choice, dict[str, float]]:
    """The fastest kernels, and the numbers of tokens before which slow ones need not be tried.

    Args:
        weights: Timed one after the other.
        tokens: Of the input.
        skipped: Numbers of tokens that a smaller `tokens` returned, by kernel.
    """
    # The caller's random numbers are the caller's.
    random = np.random.default_rng(0).standard_normal((tokens, weights[0].shape[1]), np.float32)
    x = torch.from_numpy(random).to(weights[0].dtype)
    kernels = _kernels(weights[0])
    tried = [name for name in kernels if skipped.get(name, 0) <= tokens] or [next(iter(kernels))]
    least = dict.fromkeys(tried, float("inf"))

    def race(names: Sequence[str], first: bool = False) -> None:
        for name in names:
            layers = [kernels[name](weight, None) for weight in weights]
            if first:
                layers[0](x)
            begin = time.perf_counter()
            for layer in layers:
                layer(x)
            least[name] = min(least[name], time.perf_counter() - begin)

    race(tried, first=True)
    for _ in range(ROUNDS - 1):
        race([name for name in tried if least[name] <= HOPELESS * min(least.values())])
    if _winner(least) != tried[0]:
        # What else is faster by chance is rarely so again.
        for _ in range(ROUNDS):
            race([tried[0], _winner(least)])
    best = min(least.values())
    slow = {name: tokens * seconds / best for name, seconds in least.items() if seconds > SKIPPED * best}
    name = _winner(least)
    own = {kernel: seconds for kernel, seconds in least.items() if kernel in _OWN}
    ours = name if name in own else _winner(own) if own else next(iter(kernels))
    loss = (own[ours] - least[name]) / len(weights) if own else float("inf")
    return Choice(name, ours, max(loss, 0.0)), {**skipped, **slow}


def _winner(least: dict[str, float]) -> str:
    """The first kernel that is about as fast as the fastest."""
    best = min(least.values())
    return next(name for name, seconds in least.items() if seconds <= TIE * best)


def machine(threads: int) -> dict[str, object]:
    """Properties of the machine that a measurement on the CPU depends on."""
    features = llvmlite.binding.get_host_cpu_features()
    return {
        "processor": llvmlite.binding.get_host_cpu_name(),
        "features": hashlib.sha256(features.flatten().encode()).hexdigest()[:8],
        "platform": platform.platform(terse=True),
        "cpus": os.cpu_count(),
        "threads": threads,
        "torch": str(torch.__version__),
        "kernels": source_stamp()[:16],
    }
