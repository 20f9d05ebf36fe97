"""State that outlives a request: draft sources, calibration and measured costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.budget import Budget
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.drafting.cost import CostModel
from retrieval_draft.drafting.fusion import fuse
from retrieval_draft.drafting.hierarchy import SourceHierarchy, SourceSessions
from retrieval_draft.drafting.kept_calibration import (
    FleetCalibration,
    calibration_file,
    keep_calibration,
    load_calibration,
)
from retrieval_draft.drafting.session import DraftSession, Fuse
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.engine.head_cost import HeadCost
from retrieval_draft.engine.logits import LogitReader
from retrieval_draft.engine.pass_costs import COSTS, PassCosts, keep_costs, load_costs, situation
from retrieval_draft.engine.passes import tree_passes
from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.engine.target import Target
from retrieval_draft.index.source import DraftSource, TokenArray

__all__ = ["DraftEngine", "LearnedState"]

_MEASURE_CONTEXT = 128


@dataclass(frozen=True, slots=True)
class LearnedState:
    """Learned and measured state of a supply.

    Attributes:
        calibration: None for the shipped priors.
        seconds: Of a pass by number of tokens; empty to measure.
    """

    calibration: Calibration | None = None
    seconds: dict[int, float] = field(default_factory=dict)


class DraftEngine:
    """Opens the drafting side of requests.

    Args:
        target: The model.
        config: The drafting configuration.
        sources: Draft sources, nearest first; empty for plain decoding.
        tree: Makes one tree of their proposals: (root token, proposals, calibration, max_nodes).
        nodes: Draft nodes of a step where `config` names none; None lets the measured cost decide.
        spare: Makes sources like these, to be thrown away once they have compiled their kernels.
        costs: Chooses the number of nodes where measured cost decides.

    Attributes:
        reader: Reads as many alternatives as the sources learn from.
        budget: Shares draft nodes between the rows of a batch.
    """

    def __init__(
        self,
        target: Target,
        config: DraftConfig,
        sources: Sequence[DraftSource],
        tree: Fuse = fuse,
        nodes: int | None = None,
        spare: Callable[[], Sequence[DraftSource]] = tuple,
        costs: type[CostModel] = CostModel,
    ) -> None:
        self._target = target
        self._config = config
        self._hierarchy = SourceHierarchy(sources)
        most = config.max_nodes if target.width is None else min(config.max_nodes, target.width - 1)
        fixed = config.nodes if config.nodes is not None or nodes is None else min(nodes, most)
        if fixed is None and target.width is not None:
            fixed = most  # a pass costs the same with fewer
        self._max_nodes = most if fixed is None else fixed
        self._by_cost = fixed is None
        self._tree = tree
        self._spare = spare
        self._costs = costs
        self._drafts = bool(sources) and self._max_nodes > 0
        self._calibration: Any = None  # made by prepare
        self._fleet = FleetCalibration(None, is_new=False)
        self.budget = Budget()
        self._head: HeadCost | None = None
        self._known = LearnedState()
        self.reader = LogitReader(config.top_k if self._drafts else 0)

    def prepare(self) -> None:
        """Makes calibration and measurements, once; they need a few forward passes."""
        if not self._drafts or self._calibration is not None:
            return
        from retrieval_draft.engine.warm_up import compile_kernels

        compile_kernels(self._spare(), self._tree, self._config.top_k)
        self._hierarchy.prepare()
        if self._config.prefill_logits == "auto" and self._target.width is None:
            self._head = HeadCost.measure(self._target)
        if self._by_cost:
            self.budget = Budget(self._measure())
        kept = calibration_file(self._config)
        saved = self._known.calibration
        is_kept = kept is not None and kept.exists()
        self._fleet = FleetCalibration(self._hierarchy.store, is_new=saved is None and not is_kept)
        self._calibration = load_calibration(kept) if saved is None or is_kept else saved

    def start_from(self, known: LearnedState) -> None:
        """Has `prepare` take another process's state; a calibration beside the history takes precedence."""
        self._known = known

    def known(self) -> LearnedState:
        """The state learned and measured so far."""
        if self._calibration is None:
            return self._known
        cost = self.budget.cost_of_one
        seconds = cost.seconds_by_size() if isinstance(cost, CostModel) else self._known.seconds
        return LearnedState(self._calibration, seconds)

    def prepare_like(self, other: DraftEngine) -> None:
        """Runs `prepare` with the measurements of a supply of the same model and configuration."""
        if not self._drafts or self._calibration is not None:
            return
        self._hierarchy.prepare()
        self._head, self.budget = other._head, other.budget
        kept = calibration_file(self._config)
        self._fleet = FleetCalibration(self._hierarchy.store, is_new=kept is None or not kept.exists())
        self._calibration = load_calibration(kept)

    def open(
        self,
        requests: Sequence[DecodeRequest],
        references: Sequence[TokenArray],
        stats: Sequence[DraftStats],
    ) -> list[DraftSession | None]:
        """Opens the sources for requests, and sets how much of their prompts they should learn from.

        Args:
            requests: Their `prompt_rows` is set. Those with one `prefix_owner` draft from each other.
            references: int32, shape (length,) each. Texts that the replies may quote.
            stats: Counts to add to, one for each request.

        Returns:
            For each request; None for plain decoding.
        """
        if not self._drafts:
            return [None] * len(requests)
        self._fleet.exchange(self._calibration)
        opened: dict[int, SourceSessions] = {}
        for owner in requests:
            if owner.prefix_owner is None:
                indices = [i for i, r in enumerate(requests) if r is owner or r.prefix_owner is owner]
                *earlier, context = owner.runs
                sessions = self._hierarchy.open_parallel(context, [*earlier, *references], len(indices))
                self._hierarchy.keep(earlier)
                opened.update(zip(indices, sessions, strict=True))
        return [self._session(request, opened[index], stats[index]) for index, request in enumerate(requests)]

    def _session(self, request: DecodeRequest, sources: SourceSessions, stats: DraftStats) -> DraftSession:
        sources.keep_apart(request.owner)
        length = len(request.prompt)
        has_all = self._target.width is not None and self._config.prefill_logits == "auto"
        if self._config.prefill_logits is True or has_all:
            request.prompt_rows = length
        elif self._config.prefill_logits == "auto" and self._head is not None:
            request.prompt_rows = self._head.paying_rows(request.max_length - length, length)
        noise = request.noise if self._config.known_noise else None
        return DraftSession(
            sources,
            self._tree,
            self._calibration.open(request.runs[-1], noise=noise),
            self._max_nodes,
            self._target.vocabulary,
            stats,
            request.placeholders | self._target.blank,
            request.grammar,
        )

    def flush(self) -> None:
        """Waits until the replies of finished requests can be looked up; saves calibration and costs."""
        self._hierarchy.flush()
        self._save()

    def close(self) -> None:
        """Closes the sources; saves calibration and costs."""
        self._hierarchy.close()
        self._save()

    @property
    def sources(self) -> Sequence[DraftSource]:
        """The sources, nearest first."""
        return self._hierarchy.sources

    @property
    def failures(self) -> int:
        """Calls in which a source raised so far."""
        return self._hierarchy.failures

    def _save(self) -> None:
        kept = calibration_file(self._config)
        keep_calibration(self._calibration, kept)
        seconds = self.known().seconds if self._calibration is not None else {}
        if kept is not None and seconds:
            keep_costs(kept.with_name(COSTS), PassCosts(situation(self._target, self._config), seconds))

    def _measure(self) -> CostModel:
        from retrieval_draft._progress import progress
        from retrieval_draft.drafting.cost import ROUNDS, SIZES

        kept = calibration_file(self._config)
        seconds = self._known.seconds
        if kept is not None and not seconds:
            seconds = load_costs(kept.with_name(COSTS), situation(self._target, self._config))
        if seconds:
            cost = self._costs()
            cost.device = self._target.device
            cost.load(seconds)
            return cost
        with progress("Measuring forward passes", ROUNDS * len(SIZES)) as advance:
            return self._costs.measure(self._forward(), self._target.device, advance)

    def _forward(self) -> Callable[[int], None]:
        """Passes over n nodes after a short text, which leave the cache unchanged."""
        run = tree_passes(self._target, _MEASURE_CONTEXT)

        def forward(nodes: int) -> None:
            logits = run(nodes)
            if self._target.device.type == "cuda":
                # As in the loop, where the copy of the logits waits for the pass.
                self.reader.read(logits)

        return forward
