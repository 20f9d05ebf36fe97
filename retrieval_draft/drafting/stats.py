"""Drafting counters and timings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["DraftStats"]


@dataclass(slots=True)
class DraftStats:
    """Counts and times of one request, or of all requests of a drafter.

    Attributes:
        requests: Requests counted.
        prompt_tokens: Tokens of the prompts.
        cached_tokens: Those of them whose keys were kept from earlier texts.
        tokens: Generated tokens, the one from the prefill included.
        steps: Verification steps, the prefill not included; each row of a batch counts its own.
        passes: Forward passes that verified; the rows of a batch share them.
        drafted: Draft nodes verified.
        accepted: Draft nodes accepted and emitted.
        drafted_by_source: Verified nodes by the sources that named them; agreement counts for each.
        drafted_by_level: The same by locality.
        accepted_by_source: Accepted nodes by the sources that named them; agreement counts for each.
        accepted_by_level: The same by locality.
        nodes: Number of steps by the number of draft nodes they verified.
        source_failures: Calls in which a draft source raised.
        prefill_seconds: Prompt passes.
        draft_seconds: Proposals, fusion and choice of the budget.
        forward_seconds: Passes over trees; on CUDA with the wait for them.
        accept_seconds: Reading logits and walking the tree.
        commit_seconds: Packing inputs, masks and moving the accepted path.
        learn_seconds: Updates of sources, calibration and cost.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_by_source: Counter[str] = field(default_factory=Counter)
    drafted_by_level: Counter[str] = field(default_factory=Counter)
    accepted_by_source: Counter[str] = field(default_factory=Counter)
    accepted_by_level: Counter[str] = field(default_factory=Counter)
    nodes: Counter[int] = field(default_factory=Counter)
    source_failures: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    forward_seconds: float = 0.0
    accept_seconds: float = 0.0
    commit_seconds: float = 0.0
    learn_seconds: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens over steps, prefill tokens left out."""
        return (self.tokens - self.requests) / self.steps if self.steps else 0.0

    @property
    def seconds(self) -> float:
        """All times together."""
        return float(sum(getattr(self, each.name) for each in fields(self) if each.name.endswith("_seconds")))

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted nodes."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def add(self, other: DraftStats) -> None:
        """Adds the counts of `other` to these."""
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            else:
                setattr(self, part.name, mine + theirs)

    def as_dict(self) -> dict[str, Any]:
        """Plain types for JSON, with the two ratios."""
        counts = {part.name: getattr(self, part.name) for part in fields(self)}
        return {
            # asdict() would count the items of a Counter instead of copying it.
            **{name: dict(value) if isinstance(value, Counter) else value for name, value in counts.items()},
            "tokens_per_step": self.tokens_per_step,
            "acceptance_rate": self.acceptance_rate,
        }
