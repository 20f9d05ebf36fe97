"""Decoders on recorded prompts, for anatomy and speed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_check.forced import Recorded, forced, recorded
from benchmarks.gpu_check.setting import Setting, synchronize
from retrieval_draft import RetrievalDrafter
from retrieval_draft.bench.decoders import make_contestant
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.engine.graph.graph_passes import GraphPasses
from retrieval_draft.engine.target import Target
from retrieval_draft.methods.make_draft_engine import make_draft_engine

__all__ = ["EAGER", "Beginning", "Case", "Decoded", "Decoder", "launching"]

EAGER = "-eager"
"""Suffix of a method that makes all passes anew, none from captured graphs."""

_RECORDED = "recorded"
_MEASURED = (0, 2, 8)
"""Indices of a conversation, a summary and an answer from documents among the recorded replies."""
_OTHERS = (9, 1)
"""Indices of the replies decoded before, to warm up kernels, costs and calibration."""
_WARM_TOKENS = 24
_TINY_NODES = 16
_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 50}


@dataclass(frozen=True, slots=True)
class Case:
    """A row of the table.

    Attributes:
        model: Of the setting's geometries.
        decoder: A method of ``bench live``, whose name `EAGER` may follow.
        context: "recorded" prompts unchanged, or their length in tokens after padding with text.
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
        """The decoder with the case's options."""
        parts = [self.decoder, *(["sampled"] if self.sampled else [])]
        return ", ".join(parts + ([f"{self.rows} rows"] if self.rows > 1 else []))

    @property
    def key(self) -> dict[str, Any]:
        """Names of the case in reports."""
        return {"model": self.model, "context": self.context, "decoder": self.label}


@dataclass(frozen=True, slots=True)
class Decoded:
    """Tokens and counts of one call.

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


class Beginning:
    """Measurements and calibration of a drafter, to restart from them without any texts.

    Args:
        drafter: The drafter in its present state.
    """

    def __init__(self, drafter: RetrievalDrafter) -> None:
        supply = drafter.draft_engine
        self._drafter = drafter
        self._learned = deepcopy((supply._calibration, supply.budget))

    def restore(self) -> None:
        """Gives the drafter sources without any text, as in a new process."""
        drafter = self._drafter
        supply = make_draft_engine(drafter.target, drafter.context)
        supply.prepare_like(drafter.draft_engine)
        supply._calibration, supply.budget = deepcopy(self._learned)
        drafter.draft_engine.close()
        drafter.draft_engine = supply


class Decoder:
    """A case made ready: model, method and prompts, warmed up on other texts than the measured ones.

    Args:
        setting: The shared setting; keeps decoders from one case to the next.
        case: The case.
        new: The most tokens of a reply.

    Attributes:
        groups: The prompts to measure, those of one call together.
    """

    def __init__(self, setting: Setting, case: Case, new: int) -> None:
        self.case = case
        self.is_stock = case.decoder.startswith("stock")
        self._model = setting.model(case.model)
        made = setting.decoders
        if (case.model, case.decoder) not in made:
            # The times of a rehearsal's passes depend on a busy machine, and do not predict those of drafts.
            nodes = _TINY_NODES if setting.tiny else None
            contestant: Any = make_contestant(
                case.decoder.replace(EAGER, ""),
                self._model,
                None,
                nodes,
                graphs="off" if EAGER in case.decoder else "auto",
            )
            made[case.model, case.decoder] = (
                contestant,
                None if self.is_stock else Beginning(contestant.drafter),
            )
        self._contestant, self._beginning = made[case.model, case.decoder]
        vocabulary = int(self._model.config.vocab_size)
        found = recorded(setting.trace, vocabulary, 10, max(new, _WARM_TOKENS))
        if setting.tiny:
            found = [Recorded(each.task, each.prompt[-40:], each.reply) for each in found]
        if case.context != _RECORDED:
            found = [_lengthened(each, int(case.context)) for each in found]
        self._by_prompt = {tuple(each.prompt): each.reply for each in found}
        self.groups = [found[: case.rows]] if case.rows > 1 else [[found[index]] for index in _MEASURED]
        others = [[found[index]] for index in _OTHERS]
        if case.rows > 1:
            others = [(found[case.rows :] * case.rows)[: case.rows]]
        for group in others[:1] if self.is_stock else others:
            self.decode(group, 12 if self.is_stock else _WARM_TOKENS)
            if not self.is_stock:
                self._beginning = Beginning(self._contestant.drafter)

    def decode(self, chosen: Sequence[Recorded], new: int) -> Decoded:
        """Decodes the chosen prompts together, with recorded replies for drafters, and no earlier text."""
        if self._beginning is not None:
            self._beginning.restore()
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

    @property
    def graphs(self) -> GraphPasses | None:
        """The captured passes; None where there are none."""
        found: GraphPasses | None = None if self.is_stock else self._contestant.drafter.target.graphs
        return found

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
