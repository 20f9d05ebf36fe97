"""Recent events of the engine, summarised in snapshots."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from retrieval_draft.drafting.session import count_names
from retrieval_draft.server.dashboard.rates import Rates
from retrieval_draft.server.dashboard.tree_view import tree_view
from retrieval_draft.server.scheduler.events import RequestEnd, RequestStart, RowStep, StepReport

__all__ = ["Watcher"]

_WAITING = 4096
"""Limit of reports that wait to be counted; beyond it the oldest are dropped, and the page counts fewer."""

_TIMES = ("draft", "forward", "commit", "learn")


class Watcher:
    """An `EngineListener` for the dashboard. The engine's thread only leaves reports; `snapshot` counts them.

    Args:
        text: Returns the text of a token.
        clock: Returns seconds of a monotonic clock.
    """

    def __init__(self, text: Callable[[int], str], clock: Callable[[], float] = time.monotonic) -> None:
        self._text, self._clock = text, clock
        self._waiting: deque[tuple[float, StepReport | RequestStart | RequestEnd]] = deque(maxlen=_WAITING)
        self._lock = threading.Lock()
        self._rates = Rates()
        self._tenants: dict[tuple[str, int], str] = {}
        self._trees: dict[str, RowStep] = {}
        self._drafters: dict[str, weakref.ref[Any]] = {}
        self._queue = (0, 0)
        self._seconds: dict[str, float] = dict.fromkeys(_TIMES, 0.0)
        self._drafted, self._accepted, self._row_steps, self._tokens = 0, 0, 0, 0
        self._prompt_tokens = self._cached_tokens = 0
        self._drafted_by: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self._accepted_by: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self._ended: Counter[str] = Counter()

    def queue_changed(self, waiting: int, running: int) -> None:
        """Records the number of waiting requests, and of rows in the batch."""
        self._queue = (waiting, running)

    def request_started(self, start: RequestStart) -> None:
        """Records a row that joined the batch."""
        self._waiting.append((self._clock(), start))

    def step(self, report: StepReport) -> None:
        """Records a verified forward pass."""
        self._waiting.append((self._clock(), report))

    def request_ended(self, end: RequestEnd) -> None:
        """Records a choice that is complete or aborted."""
        self._waiting.append((self._clock(), end))

    def watch(self, tenant: str, drafter: Any) -> None:
        """Shows the state of a drafter's store to its tenant."""
        self._drafters[tenant] = weakref.ref(drafter)

    def count(self) -> None:
        """Counts waiting reports. Called regularly on a background thread."""
        with self._lock:
            for _ in range(len(self._waiting)):
                when, event = self._waiting.popleft()
                if isinstance(event, StepReport):
                    self._count_step(when, event)
                elif isinstance(event, RequestStart):
                    if len(self._tenants) > _WAITING:  # ends that were never reported
                        self._tenants.clear()
                    self._tenants[event.request_id, event.index] = event.tenant
                    if event.index == 0:
                        self._prompt_tokens += event.prompt_tokens
                        self._cached_tokens += event.cached_tokens
                else:
                    self._tenants.pop((event.request_id, event.index), None)
                    self._ended[event.reason] += 1

    def snapshot(self, tenant: str) -> dict[str, Any]:
        """State that a tenant may see: sums over all, but texts only of its own requests."""
        self.count()
        with self._lock:
            tree = self._trees.get(tenant)
            waiting, running = self._queue
            return {
                "rates": self._rates.summary(self._clock()),
                "running": running,
                "waiting": waiting,
                "ended": dict(self._ended),
                "tokens": self._tokens,
                "prompt_tokens": self._prompt_tokens,
                "cached_tokens": self._cached_tokens,
                "row_steps": self._row_steps,
                "drafted": self._drafted,
                "accepted": self._accepted,
                "seconds": {name: round(value, 4) for name, value in self._seconds.items()},
                "by_source": _table(self._drafted_by[0], self._accepted_by[0]),
                "by_level": _table(self._drafted_by[1], self._accepted_by[1]),
                "tree": None if tree is None else tree_view(tree, self._text),
                "store": self._store(tenant),
            }

    def _count_step(self, when: float, report: StepReport) -> None:
        self._rates.add(when, report)
        for name in _TIMES:
            self._seconds[name] += getattr(report, f"{name}_seconds")
        for row in report.rows:
            tree, path = row.plan.tree, list(row.path[1:])
            self._row_steps += 1
            self._tokens += len(row.tokens)
            self._drafted += tree.num_draft_tokens
            self._accepted += len(path)
            count_names(row.plan.proposals, Counter(tree.sources[1:].tolist()), *self._drafted_by)
            count_names(row.plan.proposals, Counter(tree.sources[path].tolist()), *self._accepted_by)
            tenant = self._tenants.get((row.request_id, row.index))
            if tenant is not None and tree.num_draft_tokens:
                self._trees[tenant] = row

    def _store(self, tenant: str) -> dict[str, Any] | None:
        reference = self._drafters.get(tenant)
        drafter = None if reference is None else reference()
        if drafter is None or drafter.store is None:
            return None
        status = drafter.store.status()
        names = ("state", "reason", "entries", "tokens", "servers", "sent", "received", "waiting", "nbytes")
        return {name: status[name] for name in names} | {"dropped": sum(status["dropped"].values())}


def _table(drafted: Counter[str], accepted: Counter[str]) -> list[list[Any]]:
    return [[name, count, accepted[name]] for name, count in drafted.most_common()]
