from __future__ import annotations

import pytest

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.http.per_tenant import PerTenant


class Owned:
    def __init__(self, name: str) -> None:
        self.name, self.is_closed = name, False

    def close(self) -> None:
        self.is_closed = True
        if self.name == "broken":
            raise OSError("not saved")


def test_each_tenant_has_one_and_those_who_watch_learn_of_all() -> None:
    tenants, seen = PerTenant(Owned, made={"first": Owned("first")}), list[str]()
    tenants.when_made(lambda tenant, owned: seen.append(tenant))
    assert tenants["a"] is tenants["a"]
    assert tenants["a"] is not tenants["b"]
    assert seen == ["first", "a", "b"] == list(tenants.made)


def test_there_are_no_more_than_the_limit() -> None:
    tenants = PerTenant(Owned, most=1)
    tenants["a"].close()
    with pytest.raises(InvalidInputError, match="There are 1 tenants"):
        tenants["b"].close()
    assert list(tenants.made) == ["a"]


def test_all_are_closed_even_if_one_raises() -> None:
    tenants = PerTenant(Owned)
    made = [tenants[name] for name in ("a", "broken", "b")]
    with pytest.raises(OSError, match="not saved"):
        tenants.close()
    assert all(owned.is_closed for owned in made)
