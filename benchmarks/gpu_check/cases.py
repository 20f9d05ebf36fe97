"""Decoders on recorded prompts: what anatomy and speed both run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_check.forced import Recorded, forced, recorded
from benchmarks.gpu_check.setting import Setting, synchronize
from retrieval_draft.bench.contestants import make_contestant
from retrieval_draft.engine.stats import DraftStats
from retrieval_draft.engine.target import Target

__all__ = ["Case", "Decoded", "Decoder", "launching"]

_RECORDED = "recorded"
_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 50}


@dataclass(frozen=True, slots=True)
class Case:
    """A row of the table.

    Attributes:
        model: Of the setting's geometries.
        decoder: A method of ``bench live``.
        context: "recorded" prompts as they are, or how many tokens they are made long.
        rows: Prompts at a time.
        sampled: Whether tokens are drawn.
    """

    model: str
    decoder: str
    context: str = _RECORDED
    rows: int = 1
    sampled: bool = False

    @property
    def label(self) -> str:
        """The decoder with what is special."""
        parts = [self.decoder, *(["sampled"] if self.sampled else [])]
        return ", ".join(parts + ([f"{self.rows} rows"] if self.rows > 1 else []))

    @property
    def key(self) -> dict[str, Any]:
        """What names the case in reports."""
        return {"model": self.model, "context": self.context, "decoder": self.label}


@dataclass(frozen=True, slots=True)
class Decoded:
    """What one call gave.

    Attributes:
        tokens: New ones of each row.
        seconds: Of the call.
        steps: Forward passes after the prompt's.
        stats: The drafter's counts; None for `model.generate`.
    """

    tokens: list[list[int]]
    seconds: float
    steps: int
    stats: DraftStats | None


class Decoder:
    """A case made ready: model, method and prompts.

    Args:
        setting: Where it runs; keeps what is made from one case to the next.
        case: Which.
        new: The most tokens of a reply.
    """

    def __init__(self, setting: Setting, case: Case, new: int) -> None:
        self.case = case
        self.is_stock = case.decoder.startswith("stock")
        self._model = setting.model(case.model)
        made = setting.contestants
        if (case.model, case.decoder) not in made:
            made[case.model, case.decoder] = make_contestant(case.decoder, self._model, None, None)
        self._contestant = made[case.model, case.decoder]
        vocabulary = int(self._model.config.vocab_size)
        found = recorded(setting.trace, vocabulary, 10, new)
        if setting.tiny:
            found = [Recorded(each.task, each.prompt[-40:], each.reply) for each in found]
        if case.context != _RECORDED:
            found = [_lengthened(each, int(case.context)) for each in found]
        self.recorded: list[Recorded] = found
        self._by_prompt = {tuple(each.prompt): each.reply for each in found}

    def decode(self, chosen: Sequence[Recorded], new: int) -> Decoded:
        """Decodes the chosen prompts together, drafters saying what was recorded."""
        ids, mask = self._padded(chosen)
        sampling: dict[str, Any] = {"do_sample": False} if not self.case.sampled else dict(_SAMPLING)
        if self.case.sampled and not self.is_stock:
            sampling["seed"] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": new, **sampling}
        around = nullcontext() if self.is_stock else forced(self._by_prompt)
        with around:
            synchronize(ids.device)
            begin = time.perf_counter()
            out = self._contestant.call(inputs)
            tokens = out[:, ids.shape[1] :].tolist()
            seconds = time.perf_counter() - begin
        if self.is_stock:
            return Decoded(tokens, seconds, new - 1, None)
        stats = self._contestant.drafter.last_stats
        return Decoded(tokens, seconds, stats.passes, stats)

    def _padded(self, chosen: Sequence[Recorded]) -> tuple[Tensor, Tensor]:
        longest = max(len(each.prompt) for each in chosen)
        ids = [[0] * (longest - len(each.prompt)) + each.prompt for each in chosen]
        mask = [[0] * (longest - len(each.prompt)) + [1] * len(each.prompt) for each in chosen]
        device = self._model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _lengthened(one: Recorded, length: int) -> Recorded:
    """The prompt with random text before it."""
    generator = torch.Generator().manual_seed(length)
    before = torch.randint(5, 20000, (max(0, length - len(one.prompt)),), generator=generator).tolist()
    return Recorded(one.task, before + one.prompt, one.reply)


@contextmanager
def launching() -> Iterator[list[float]]:
    """Collects the seconds in which the host launched passes over trees."""
    seconds: list[float] = []
    verify = Target.verify_rows

    def timed(target: Target, *rest: Any) -> Tensor:
        begin = time.perf_counter()
        try:
            return verify(target, *rest)
        finally:
            seconds.append(time.perf_counter() - begin)

    with mock.patch.object(Target, "verify_rows", timed):
        yield seconds
