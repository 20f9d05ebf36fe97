"""The layers that a model leaves out to draft for itself, found by scores on its own text."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["LayerSearch"]

SINGLES = 32
"""Single layers that are tried at most, spread over a deep model."""

MORE = 8
"""Further layers that are tried beside the best one."""


class LayerSearch:
    """Search for the set of layers to skip, one candidate after the other.

    As in SWIFT (arXiv:2410.06916) candidates are scored on text that the model has emitted, and the best set
    is kept; in place of its random and Bayesian search, which takes hundreds of passes, each layer is tried
    alone, then the best ones together. So the number of candidates is bounded, and the same scores find the
    same set. A set is worth the tokens a second that a chain of its drafts would yield.

    Args:
        layers: Number of the model's layers. The first is never skipped.
        head: Cost of the rest of a draft pass, above all the output head, in layers.
        depth: Drafts in a chain at most.
        needed: Further layers that are never skipped.

    Attributes:
        best: The best set so far; empty before the first score.

    Example:
        18 layers: 17 candidates of one layer; if 16 is best and 13 next, then (13, 16), ...
    """

    def __init__(self, layers: int, head: float, depth: int, needed: Collection[int] = ()) -> None:
        self._layers, self._head, self._depth = layers, head, depth
        step = max(1, -(-(layers - 1) // SINGLES))
        singles = [layer for layer in range(layers - 1, 0, -1) if layer not in needed]
        self._waiting: list[tuple[int, ...]] = [(layer,) for layer in singles[::step]]
        self._singles: list[tuple[float, int]] | None = []
        self.best: tuple[int, ...] = ()
        self._value = 0.0

    @property
    def candidate(self) -> tuple[int, ...] | None:
        """The next set to score; None once the search is over."""
        return self._waiting[0] if self._waiting else None

    def note(self, score: float) -> None:
        """Takes the candidate's score, the chance that a draft of it is right.

        Raises:
            IndexError: The search is over.
        """
        candidate = self._waiting.pop(0)
        found = self.value(score, len(candidate))
        if self._singles is not None:
            self._singles.append((found, candidate[0]))
        if found > self._value:
            self.best, self._value = candidate, found
        if self._waiting:
            return
        if self._singles is not None:
            order = sorted(self._singles, key=lambda each: (-each[0], each[1]))
            self._others, self._singles = [layer for _, layer in order[1 : 1 + MORE]], None
        if self._others:
            self._waiting = [tuple(sorted((*self.best, self._others.pop(0))))]

    def value(self, score: float, skipped: int) -> float:
        """Tokens of a step in the time of a whole pass, for drafts that are right with this chance."""
        whole = self._layers + self._head
        price = (whole - skipped) / whole
        right = tokens = 1.0
        best = 0.0
        for depth in range(1, self._depth + 1):
            right *= score
            tokens += right
            best = max(best, tokens / (1 + depth * price))
        return best
