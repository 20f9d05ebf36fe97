"""One vLLM engine whose drafts come from several proposers in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["SWITCH", "Propose", "Switchboard"]

SWITCH = "benchmarks.vllm_switch.Switchboard"
"""Dotted path of the proposer, for vLLM to load."""

Propose = Callable[[Any, Sequence[Sequence[int]], Any, Any], list[list[int]]]
"""(vLLM's input batch, sampled tokens, lengths, texts) to drafts."""


class Switchboard:
    """A proposer for vLLM that passes each call on to `current`, and counts.

    So methods take turns on one model, and differ in their drafts only.

    Args:
        vllm_config: vLLM's.

    Attributes:
        vllm_config: As given; methods are made from it.
        current: Drafts; None for no drafts.
        runner: vLLM's model runner, whose batch vLLM's own suffix method wants; set by the bench.
        steps: Calls since `reset`.
        drafted: Draft tokens of all calls but the last, whose drafts were not verified.
        accepted: Number of these that were sampled.
        sizes: Number of steps by the number of verified draft tokens.
        drafts: Calls with a draft for a row whose outcome a later call showed.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.current: Propose | None = None
        self.runner: Any = None
        self.reset()

    def reset(self) -> None:
        """Sets all counts to zero."""
        self.steps = self.drafted = self.accepted = self.drafts = 0
        self.sizes: Counter[int] = Counter()
        self._pending = 0

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: there is no model to load."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts of the method whose turn it is."""
        if self.steps:
            self.sizes[self._pending] += 1
        if self._pending:
            self.drafts += 1
            self.drafted += self._pending
            self.accepted += sum(max(len(sampled) - 1, 0) for sampled in sampled_token_ids)
        self.steps += 1
        if self.current is None:
            drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        else:
            batch = None if self.runner is None else self.runner.input_batch
            drafts = self.current(batch, sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        self._pending = sum(map(len, drafts))
        return drafts
