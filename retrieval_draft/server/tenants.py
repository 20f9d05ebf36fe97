"""A drafter for each tenant, over one model; learned state is not shared between tenants."""

from __future__ import annotations

from collections.abc import Callable

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.http.per_tenant import PerTenant

__all__ = ["Tenants"]


class Tenants(PerTenant[RetrievalDrafter]):
    """The drafters of tenants, made when they are first needed. Thread-safe.

    Args:
        drafter: Of the default tenant; the others share its model, corpora and measurements.
        default: Its name.
        history_bytes: Memory for the history of each other tenant.
        key: The namespace of a tenant; its name by default.
    """

    def __init__(
        self, drafter: RetrievalDrafter, default: str, history_bytes: int, key: Callable[[str], str] = str
    ) -> None:
        super().__init__(
            lambda tenant: drafter.namespace(key(tenant), history_bytes), made={default: drafter}
        )

    def close(self) -> None:
        """Saves their learned state, and sends texts that wait for the store."""
        for drafter in self.made.values():
            drafter.flush()
        super().close()
