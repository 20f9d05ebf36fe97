"""Measured seconds of passes, kept in the history's folder from one process to the next."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import torch

from retrieval_draft._files import read_bounded, replace_file
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.cost import SIZES
from retrieval_draft.engine.cpu.linear_choice import machine
from retrieval_draft.engine.target import Target

__all__ = ["COSTS", "PassCosts", "keep_costs", "load_costs", "situation"]

COSTS = "pass_costs.json"
"""Name of the file in the history's folder."""

MOST_SITUATIONS = 16
"""Models and machines that a file keeps; those written longest ago go."""

MOST_SECONDS = 1e6
"""Limit of a time; no pass takes as long."""

_MOST_BYTES = 1 << 20
_log = logging.getLogger("retrieval_draft")


class PassCosts(msgspec.Struct):
    """Measured seconds of a forward pass by number of tokens, and the machine and model they are of."""

    situation: dict[str, str]
    seconds: dict[int, float]

    def seconds_in(self, present: dict[str, str]) -> dict[int, float]:
        """The seconds if they are of this situation, and of every size that is measured; else none."""
        fits = self.situation == present and set(self.seconds) == set(SIZES)
        return self.seconds if fits and self.is_plausible else {}

    @property
    def is_plausible(self) -> bool:
        """True if every time is one that a pass can take."""
        return all(0.0 < each < MOST_SECONDS for each in self.seconds.values())


def situation(target: Target, config: DraftConfig) -> dict[str, str]:
    """Properties that the costs of passes depend on."""
    model: Any = target.model
    weights = list(model.parameters())
    device = target.device
    return {
        "machine": str(machine(torch.get_num_threads())),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "model": type(model).__name__,
        "bytes": str(sum(weight.nbytes for weight in weights)),
        "dtypes": ", ".join(sorted({str(weight.dtype) for weight in weights})),
        "attention": str(model.config._attn_implementation),
        "cpu_kernels": str(config.cpu_kernels),
        "graphs": str(config.graphs),
    }


def load_costs(path: Path, present: dict[str, str]) -> dict[int, float]:
    """Seconds by number of tokens that a process in the same situation has measured; empty for none.

    Args:
        path: The file; missing, torn or foreign it costs a measurement.
        present: From `situation`.
    """
    return next((found for each in _read(path) if (found := each.seconds_in(present))), {})


def keep_costs(path: Path, costs: PassCosts) -> None:
    """Writes costs beside those of other situations. On a full disk they are lost, and nothing else fails."""
    others = [each for each in _read(path) if each.situation != costs.situation]
    content = msgspec.json.encode([costs, *others[: MOST_SITUATIONS - 1]])
    try:
        replace_file(path, msgspec.json.format(content, indent=1) + b"\n")
    except OSError as error:
        _log.warning("Measured costs could not be saved to %s: %s", path, error)


def _read(path: Path) -> list[PassCosts]:
    try:
        if not path.exists():
            return []
        return msgspec.json.decode(read_bounded(path, _MOST_BYTES), type=list[PassCosts])
    except (OSError, ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        _log.warning("Passes are measured again: %s cannot be used: %s.", path, error)
        return []
