"""One object for each tenant."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Generic, Protocol, TypeVar

from retrieval_draft.errors import InvalidInputError

__all__ = ["PerTenant"]


class _Closable(Protocol):
    def close(self) -> None: ...


Owned = TypeVar("Owned", bound=_Closable)


class PerTenant(Generic[Owned]):
    """Objects by tenant, each made when it is first needed. Thread-safe.

    Args:
        make: Makes the object of a tenant.
        most: Limit of tenants, of which there are at most as many as API keys.
        made: Objects that there are already.

    Example:
        proposers = PerTenant(lambda tenant: Proposer.for_tokenizer(tokenizer))
        session = proposers["team-a"].open(prompt)
    """

    def __init__(
        self, make: Callable[[str], Owned], most: int = 4096, made: Mapping[str, Owned] | None = None
    ) -> None:
        self._make, self._most = make, most
        self._made = dict(made or {})
        self._lock = threading.Lock()
        self._watchers: list[Callable[[str, Owned], object]] = []

    def __getitem__(self, tenant: str) -> Owned:
        """The tenant's object; made at the first call.

        Raises:
            InvalidInputError: There are too many tenants.
        """
        found = self._made.get(tenant)
        if found is not None:
            return found
        with self._lock:
            if tenant not in self._made:
                if len(self._made) >= self._most:
                    raise InvalidInputError(f"There are {self._most} tenants, and no more may be.")
                self._made[tenant] = self._make(tenant)
                for call in self._watchers:
                    call(tenant, self._made[tenant])
            return self._made[tenant]

    def when_made(self, call: Callable[[str, Owned], object]) -> None:
        """Calls `call` with every tenant and its object, at once for existing ones."""
        with self._lock:
            self._watchers.append(call)
            for tenant, owned in self._made.items():
                call(tenant, owned)

    @property
    def made(self) -> Mapping[str, Owned]:
        """Objects made so far, by tenant."""
        return dict(self._made)

    def close(self) -> None:
        """Closes all, even if one of them raises."""
        with self._lock, ExitStack() as stack:
            for owned in self._made.values():
                stack.callback(owned.close)
