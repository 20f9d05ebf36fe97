"""A drafter for each tenant, over one model; learned state is not shared between tenants."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from retrieval_draft.drafter import RetrievalDrafter

__all__ = ["Tenants"]


class Tenants:
    """Makes the drafters of tenants when they are first needed. Thread-safe.

    Args:
        drafter: Of the default tenant; the others share its model, corpora and measurements.
        default: Its name.
        history_bytes: Memory for the history of each other tenant.
        key: The namespace of a tenant; None for its name.
    """

    def __init__(
        self,
        drafter: RetrievalDrafter,
        default: str,
        history_bytes: int,
        key: Callable[[str], str] | None = None,
    ) -> None:
        self._drafters = {default: drafter}
        self._default, self._history_bytes = default, history_bytes
        self._key = key
        self._lock = threading.Lock()
        self._watchers: list[Callable[[str, RetrievalDrafter], object]] = []

    def __getitem__(self, tenant: str) -> RetrievalDrafter:
        """The drafter of a tenant; made if there is none."""
        found = self._drafters.get(tenant)
        if found is not None:
            return found
        with self._lock:
            if tenant not in self._drafters:
                main = self._drafters[self._default]
                key = tenant if self._key is None else self._key(tenant)
                self._drafters[tenant] = main.namespace(key, self._history_bytes)
                for call in self._watchers:
                    call(tenant, self._drafters[tenant])
            return self._drafters[tenant]

    def when_made(self, call: Callable[[str, RetrievalDrafter], object]) -> None:
        """Calls `call` with every tenant and its drafter, at once for existing ones."""
        with self._lock:
            self._watchers.append(call)
            for tenant, drafter in self._drafters.items():
                call(tenant, drafter)

    @property
    def made(self) -> Mapping[str, RetrievalDrafter]:
        """Drafters made so far, by tenant."""
        return dict(self._drafters)

    def close(self) -> None:
        """Saves their learned state, and sends texts that wait for the store."""
        for drafter in self.made.values():
            drafter.flush()
            drafter.close()
